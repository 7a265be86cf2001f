"""What DDP and FSDP2 share: an optimizer that steps the model's own parameters.

A module of its own since neither is part of the other; under DeepSpeed (zero.py) the optimizer steps flat
copies instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from raydist.job.schema import Job
from raydist.parallel.loss_scale import loss_scale_for, written_scale
from raydist.parallel.optimizer import clip_, make_optimizer, set_learning_rate
from raydist.parallel.saver import Saver
from raydist.parallel.share import Piece, share_of
from raydist.parallel.state import load_state, state_by_name
from raydist.parallel.strategy import SaveHandle, Take
from raydist.parallel.world import World


class OwnOptimizer:
    """Base of a strategy. `module` is the bare model."""

    def __init__(self, model: nn.Module, job: Job, world: World) -> None:
        self.module, self.job, self.world = model, job, world
        self.model: nn.Module = model
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(model, job.train)
        self.loss_scale = loss_scale_for(job.train.mixed_precision)
        self._saver = Saver(world)

    def _scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass begins with."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def _step(
        self, lr: float, max_grad_norm: float | None, gradients: list[Tensor], norm: Tensor, take: Take | None
    ) -> Tensor:
        """gradients, norm: as the backward passes left them, scaled. fp16 and `take` wait for the norm."""
        if self.loss_scale is not None:
            scale = self.loss_scale.scale
            norm = norm / scale
            if not self.loss_scale.accepts(norm.item()):
                return norm
            torch._foreach_mul_(gradients, 1 / scale)
        if take is not None and not take(norm.item()):
            return norm
        clip_(gradients, norm, max_grad_norm)
        set_learning_rate(self.optimizer, lr)
        self._saver.settle()
        self.optimizer.step()
        return norm

    def save(self, folder: Path, *, behind: bool) -> SaveHandle:
        share, more = self._share(), written_scale(self.loss_scale, self.world)
        return self._saver.save(folder, [*share], share.values(), more, behind=behind, lasting=True)

    def reserve(self) -> None:
        self._saver.reserve(self._share())

    def close(self) -> None:
        self._saver.close()

    def _share(self) -> dict[Piece, Tensor]:
        state = state_by_name(self.trainable, self.optimizer)
        return share_of(state, self.world.rank, self.world.world_size)

    def load(self, folder: Path, step: int | None) -> None:
        self._saver.settle()
        if self.loss_scale is not None and step is not None:
            self.loss_scale.load(folder)
        load_state(folder, self.trainable, self.optimizer, step)

    def reset_optimizer(self) -> None:
        self._saver.settle()
        self.optimizer.state.clear()

    def gather_full(self, parameter: nn.Parameter) -> Tensor:
        return parameter
