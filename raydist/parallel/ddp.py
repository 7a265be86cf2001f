"""Every rank holds the whole model; gradients are summed once per step.

On CPU all gradients live in one flat fp32 buffer that is reduced after the last micro batch: one
message, and the same sums at every world size after a resume (torch's buckets were not, at 3 ranks).
On a GPU torch's DistributedDataParallel overlaps its buckets with the backward pass. Models
that are trained whole in 16 bits take fsdp.py's Replicated there.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydist.job.schema import Job
from raydist.model.loss import autocast, loss_of
from raydist.parallel.optimizer import gradient_norm
from raydist.parallel.own_optimizer import OwnOptimizer
from raydist.parallel.strategy import Take
from raydist.parallel.world import World


class Ddp(OwnOptimizer):
    def _loss(self, batch: dict[str, Tensor], n_labels: int) -> Tensor:
        with autocast(self.world.device, self.job.train.mixed_precision):
            return loss_of(self.model, batch) / n_labels


class DdpOnCpu(Ddp):
    def __init__(self, model: nn.Module, job: Job, world: World) -> None:
        super().__init__(model, job, world)
        self._flat = torch.zeros(sum(p.numel() for p in self.trainable.values()))
        for parameter, view in zip(self.trainable.values(), self._views(), strict=True):
            parameter.grad = view

    def _views(self) -> list[Tensor]:
        parts = self._flat.split([p.numel() for p in self.trainable.values()])
        return [part.view_as(p) for part, p in zip(parts, self.trainable.values(), strict=True)]

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        loss = self._loss(batch, n_labels)
        self._scaled(loss).backward()
        if last:
            self.world.sum_(self._flat)
        return loss.detach()

    def update(self, lr: float, max_grad_norm: float | None, take: Take | None = None) -> Tensor:
        norm = self._step(lr, max_grad_norm, [self._flat], gradient_norm([self._flat]), take)
        self._flat.zero_()
        return norm


class DdpOnGpu(Ddp):
    def __init__(self, model: nn.Module, job: Job, world: World) -> None:
        super().__init__(model, job, world)
        if world.world_size > 1:
            self.model = DistributedDataParallel(
                model, device_ids=[world.device], gradient_as_bucket_view=True, broadcast_buffers=False
            )

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """Buckets are averaged over the ranks, so the loss is multiplied by their number."""
        ddp = self.model if isinstance(self.model, DistributedDataParallel) else None
        with ddp.no_sync() if ddp is not None and not last else contextlib.nullcontext():
            loss = self._loss(batch, n_labels)
            self._scaled(loss * self.world.world_size).backward()
        return loss.detach()

    def update(self, lr: float, max_grad_norm: float | None, take: Take | None = None) -> Tensor:
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = self._step(lr, max_grad_norm, gradients, gradient_norm(gradients), take)
        self.optimizer.zero_grad()
        return norm
