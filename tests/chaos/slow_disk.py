"""A rank whose checkpoints go to a slow disk, so that a kill strikes while they are written."""

from __future__ import annotations

import contextlib
import time
from io import FileIO
from typing import Any

from raydist.errors import WorkerLost
from raydist.parallel import saver
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.torchrun import torchrun_world, train_rank

PART_BYTES, PART_SECONDS = 2**14, 0.001
"""A checkpoint of 240 KB takes about 15 ms, and then what flushing takes."""


class SlowStream(FileIO):
    def write(self, content: Any) -> int:
        time.sleep(PART_SECONDS)
        return super().write(content[:PART_BYTES])


def train_on_a_slow_disk(spec: AttemptSpec) -> None:
    """In a forked rank."""
    saver._create = lambda path: SlowStream(path, "xb")
    with torchrun_world() as world, contextlib.suppress(WorkerLost):  # another rank was killed
        train_rank(spec, world)
