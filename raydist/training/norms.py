"""Ends an attempt whose gradients are no numbers, without making a GPU wait for each step's norm.

A norm is read while the GPU computes the step after it. So that step may be taken as well, but nothing of
either is kept: every norm is read before an evaluation, a checkpoint and the end. Where guards decide before
a step (`guards.mode: on`), nothing of this is needed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydist.errors import TrainingError
from raydist.folder import RunFolder
from raydist.parallel.world import World

if TYPE_CHECKING:
    from raydist.feed.loader import Step


@dataclass(frozen=True)
class Taken:
    """A step of the optimizer. samples: those before its global batch.  loss: this rank's share.

    batch: this rank's part of the batch, if anybody may still ask for it.
    """

    step: int
    samples: int
    loss: Tensor
    batch: Step | None = None


class Norms:
    """The norms of steps, in order. Every rank has the same ones, and reads them at the same steps.

    on_read: called with each step and its norm once that is read and finite; its loss is on the CPU then.
    """

    def __init__(
        self, folder: RunFolder, world: World, on_read: Callable[[Taken, float], None] | None = None
    ) -> None:
        self._folder, self._world, self._on_read = folder, world, on_read
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None, Taken]] = deque()
        self.behind = 0 if world.device.type == "cpu" else 1  # steps

    def add(self, norm: Tensor, taken: Taken) -> None:
        """norm: scalar, on the device. Raises TrainingError for an earlier step, on CPU for this one."""
        arrived = None
        if norm.is_cuda:
            norm = norm.to("cpu", non_blocking=True)
            taken = replace(taken, loss=taken.loss.to("cpu", non_blocking=True))
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        self._unread.append((norm, arrived, taken))
        self._read_all_but(self.behind)

    def check(self) -> None:
        """Raises TrainingError if the norm of a step so far is not finite. A GPU is waited for."""
        self._read_all_but(0)

    def _read_all_but(self, n: int) -> None:
        while len(self._unread) > n:
            norm, arrived, taken = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            if not math.isfinite(norm.item()):
                raise self.located(_not_finite(norm.item()), taken)
            if self._on_read is not None:
                self._on_read(taken, norm.item())

    def located(self, error: TrainingError, taken: Taken) -> TrainingError:
        """The error with its step. Collective."""
        total = self._world.sum_floats([taken.loss.item()])[0]
        return TrainingError(
            f"step {taken.step}: {error.what}, the loss {total:.6g}",
            where=f"{self._folder.path}, the global batch from sample {taken.samples} on",
            why=error.why,
            fix=error.fix,
        )


def _not_finite(norm: float) -> TrainingError:
    return TrainingError(
        f"the gradient norm is {norm}",
        why="a step with it destroys the weights, so the run stays at its last checkpoint",
        fix="lower train.lr, raise train.warmup_ratio or set train.max_grad_norm",
    )
