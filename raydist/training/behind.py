"""Whether checkpoints are written behind training: where the hosts have the memory for a copy of the state.

Known after the attempt's first step: then the optimizer has its state, and the process's peak tells what the
next steps take again. The copies' memory is taken at once, in the background.
"""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING

import psutil

from raydist.errors import JobError
from raydist.parallel.footprint import FP32
from raydist.parallel.world import World
from raydist.training.hooks import Hook, StepResult
from raydist.training.memory import available_memory, peak_resident

if TYPE_CHECKING:
    from raydist.training.loop import Attempt

KEPT_FREE = 0.05
"""Share of a host's free memory that copies leave."""
KEY = "checkpoint.asynchronous"


class WriteBehind(Hook):
    """Sets `attempt.checkpoints.behind`. Raises JobError where the job insists on copies that do not fit."""

    def __init__(self) -> None:
        self._decided = False

    def on_start(self, attempt: Attempt) -> None:
        asked = attempt.job.checkpoint.asynchronous
        self._decided = not asked
        if asked is True:  # what is certain before the first step
            self._look(attempt, later=0)

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if self._decided:
            return
        self._decided = True
        if self._look(attempt, _later(attempt)):
            attempt.checkpoints.behind = True
            attempt.strategy.reserve()

    def _look(self, attempt: Attempt, later: int) -> bool:
        """Collective. later: bytes that this process will take besides."""
        copy = math.ceil(attempt.state_bytes / attempt.world.world_size)
        short = short_of_memory(attempt.world, copy, later, available_memory())
        if not short:
            return True
        if attempt.job.checkpoint.asynchronous is True:
            raise JobError(
                f"{KEY} is true, and there is no memory for it",
                where=KEY,
                why=short,
                fix="let it be auto or false: then training waits while a checkpoint is written; or take"
                " workers on more hosts",
            )
        attempt.record("incident", what=f"training waits while a checkpoint is written: {short}")
        return False


def _later(attempt: Attempt) -> int:
    """Of host memory: on CPU what a step takes and gives back; on rank 0 the weights of model/ as well."""
    device, adapter = attempt.world.device.type, attempt.job.adapter
    step = peak_resident() - psutil.Process().memory_info().rss if device == "cpu" else 0
    exported = attempt.n_trainable if adapter else attempt.n_parameters
    return max(0, step) + (exported * FP32 if attempt.world.is_main else 0)


def short_of_memory(world: World, copy: int, later: int, free: int) -> str:
    """Collective: the first host whose ranks' copies do not fit, with the numbers; empty where all fit.

    Bytes, of this rank. free: of its host.
    """
    ranks = world.gather((socket.gethostname(), copy, later, free))
    for host in dict.fromkeys(name for name, *_ in ranks):
        here = [numbers for name, *numbers in ranks if name == host]
        copies, rest = sum(n for n, _, _ in here), sum(n for _, n, _ in here)
        least = min(n for _, _, n in here)
        if copies + rest > (1 - KEPT_FREE) * least:
            also = f", besides {_gb(rest)} for steps and model/" if rest else ""
            return (
                f"{host} has {_gb(least)} of memory free, and copies of the state of its {len(here)} workers"
                f" take {_gb(copies)}{also}"
            )
    return ""


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"
