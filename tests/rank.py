"""One rank, as the fork server starts it: `python -m tests.rank FILE` in the environment of torchrun.

FILE is a pickled AttemptSpec, which is trained, or a pickled function, which is called.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from raydist.training.attempt_spec import AttemptSpec
from raydist.training.torchrun import torchrun_world, train_rank


def main(path: str) -> int:
    work = pickle.loads(Path(path).read_bytes())
    if not isinstance(work, AttemptSpec):
        work()
        return 0
    with torchrun_world() as world:
        train_rank(work, world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
