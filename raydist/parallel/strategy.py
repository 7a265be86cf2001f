"""What the loop asks of a way to spread a model over ranks, and which way a job chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.parallel.world import World


class Strategy(Protocol):
    """A model, its optimizer and the ranks. All methods are called by all ranks alike.

    model: what a forward pass calls, also for evaluation.  module: the bare one, with its own names.
    """

    model: nn.Module
    module: nn.Module

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """Add a micro batch to the step's gradient; scalar: its share of the step's loss, detached.

        n_labels: of the whole step over all ranks, so shares and gradients are sums, never means.
        last: the step's last micro batch on this rank.
        """

    def update(self, lr: float, max_grad_norm: float | None) -> float:
        """Clip and take the optimizer step; the global gradient norm before clipping.

        Raises TrainingError when the norm is not finite; the attempt must then end.
        """

    def save(self, folder: Path) -> None:
        """Write trainable weights and optimizer state; on return this rank's files are complete."""

    def load(self, folder: Path, step: int | None) -> None:
        """Take back what any strategy saved at `step`, at any number of ranks; None: the weights alone.

        Raises CheckpointError when it does not fit the model.
        """

    def gather_full(self, parameter: nn.Parameter) -> Tensor:
        """The parameter gathered from all ranks, on rank 0; what it is elsewhere does not matter."""


def make_strategy(model: nn.Module, job: Job, world: World, accumulation_steps: int) -> Strategy:
    """accumulation_steps: micro batches per step and rank."""
    if world.device.type not in ("cpu", "cuda"):
        raise JobError(
            f"no strategy for {world.device.type} devices", fix="train on CPU or on NVIDIA or AMD GPUs"
        )
    if job.strategy.name == "fsdp":
        from raydist.parallel.fsdp import Fsdp

        return Fsdp(model, job, world)
    if job.strategy.name == "zero":
        from raydist.parallel.zero import Zero

        return Zero(model, job, world, accumulation_steps)
    from raydist.parallel.ddp import DdpOnCpu, DdpOnGpu

    return (DdpOnCpu if world.device.type == "cpu" else DdpOnGpu)(model, job, world)
