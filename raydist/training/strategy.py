"""What the loop asks of a way to spread a model over ranks: DDP today, sharding ones behind the same face."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.training.world import World


class Strategy(Protocol):
    """A model, its optimizer and the ranks. All methods are called by all ranks alike.

    model: what a forward pass calls, also for evaluation.
    """

    model: nn.Module

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """Add a micro batch to the step's gradient; scalar: its share of the step's loss, detached.

        n_labels: of the whole step over all ranks, so shares and gradients are sums, never means.
        last: the step's last micro batch on this rank, when gradients may travel.
        """

    def update(self, lr: float, max_grad_norm: float | None) -> float:
        """Clip and take the optimizer step; the global gradient norm before clipping.

        Raises TrainingError, with the weights as they were, when the norm is not finite.
        """

    def save(self, folder: Path) -> None:
        """Write trainable weights and optimizer state; on return this rank's files are complete."""

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """Take back what `save` wrote. Raises CheckpointError when it does not fit the model."""

    def export(self) -> nn.Module | None:
        """On rank 0 the model with its full weights, to be saved for others; elsewhere None."""


def make_strategy(model: nn.Module, job: Job, world: World) -> Strategy:
    from raydist.training.ddp import DdpOnCpu, DdpOnGpu

    if world.device.type == "cpu":
        return DdpOnCpu(model, job, world)
    if world.device.type == "cuda":
        return DdpOnGpu(model, job, world)
    raise JobError(
        f"no strategy for {world.device.type} devices", fix="train on CPU or on NVIDIA or AMD GPUs"
    )
