"""What the loop asks of a way to spread a model over ranks, and which way a job chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from raydist.parallel.loss_scale import LossScale

Take = Callable[[float], bool]
"""Whether to take the step with this global gradient norm, before clipping. It may sum over the ranks."""


class SaveHandle(Protocol):
    """State that is being written by this rank. A checkpoint is committed when every rank is done."""

    def done(self, within: float = 0.0) -> bool:
        """Whether this rank's files are complete, or are within so many seconds.

        Raises what went wrong in writing them.
        """

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """{name: {size, xxh3_128}} of this rank's files, once they are complete."""


class Strategy(Protocol):
    """A model, its optimizer and the ranks. All methods are called by all ranks alike.

    model: what a forward pass calls, also for evaluation.  module: the bare one, with its own names.
    loss_scale: of fp16, else None; part of what is saved.
    """

    model: nn.Module
    module: nn.Module
    loss_scale: LossScale | None

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """Add a micro batch to the step's gradient; scalar: its share of the step's loss, detached.

        n_labels: of the whole step over all ranks, so shares and gradients are sums, never means.
        last: the step's last micro batch on this rank.
        """

    def update(self, lr: float, max_grad_norm: float | None, take: Take | None = None) -> Tensor:
        """Clip and take the optimizer step; scalar fp64: the global gradient norm before clipping.

        take: asked before the step; where it says no, the gradients are dropped, and weights and optimizer
        state stay as they are. A GPU is waited for. Without it nothing waits for the norm, so a step is taken
        also where it is not finite: the caller reads it in time and ends the attempt before the weights are
        used. In fp16 such a step is never taken, and `take` is not asked about it.
        Raises TrainingError for too many of these in a row; the attempt must then end.
        """

    def save(self, folder: Path, *, behind: bool) -> SaveHandle:
        """Begin to write trainable weights and optimizer state as they are now; training may go on.

        behind: from a copy in host memory, while training goes on; else all is written on return.
        """

    def reserve(self) -> None:
        """Take the memory for such copies, in the background. The optimizer has its state by now."""

    def close(self) -> None:
        """What is being written is left unfinished: the attempt ends."""

    def load(self, folder: Path, step: int | None) -> None:
        """Take back what any strategy saved, at any number of ranks, also in place of steps taken since.

        step: those that the optimizer had taken; None: the weights alone. Raises CheckpointError when it does
        not fit the model.
        """

    def reset_optimizer(self) -> None:
        """The optimizer is as if it had taken no step."""

    def gather_full(self, parameter: nn.Parameter) -> Tensor:
        """The parameter gathered from all ranks, on rank 0; what it is elsewhere does not matter."""
