"""One rank of a pickled AttemptSpec, as `torchrun ... -m tests.rank SPEC` or the fork server starts it."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from raydist.training.torchrun import torchrun_world, train_rank


def main(path: str) -> int:
    spec = pickle.loads(Path(path).read_bytes())
    with torchrun_world() as world:
        train_rank(spec, world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
