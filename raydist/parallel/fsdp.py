"""FSDP2: weights, gradients and optimizer state are sharded over the ranks, a layer at a time.

Each decoder layer is gathered for its forward and its backward pass and freed after it. Gradients
are reduce-scattered after every micro batch: kept whole until the last one they would need the
memory that sharding saves. A quantized layer is sharded too, as bytes that go by the dtype of the others.

`Replicated` shards nothing: it is DDP, whose layers compute in 16 bits over weights of fp32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raydist.job.schema import Job
from raydist.model.layers import layers_of
from raydist.model.loss import loss_of
from raydist.model.precision import DTYPES
from raydist.model.quantized import Quantized
from raydist.parallel.optimizer import gradient_norm
from raydist.parallel.own_optimizer import OwnOptimizer
from raydist.parallel.strategy import Take
from raydist.parallel.weights import broadcast_weights, materialize
from raydist.parallel.world import World


class Fsdp(OwnOptimizer):
    """The weights are DTensors of fp32, sharded by rows; bf16 and fp16 gather them in 16 bits."""

    def __init__(self, model: nn.Module, job: Job, world: World) -> None:
        world.ensure_group()
        materialize(model)
        mesh = self._mesh(world)
        compute = DTYPES[job.train.mixed_precision]
        narrow = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        policy = MixedPrecisionPolicy() if compute == torch.float32 else narrow
        for module in model.modules():
            if isinstance(module, Quantized):
                module.store_as(compute)
        for module in [*layers_of(model), model]:
            broadcast_weights(module)
            _sum_gradients(fully_shard(module, mesh=mesh, mp_policy=policy))
        super().__init__(model, job, world)

    def _mesh(self, world: World) -> DeviceMesh:
        return init_device_mesh(world.device.type, (world.world_size,))

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        loss = loss_of(self.model, batch) / n_labels
        self._scaled(loss).backward()
        return loss.detach()

    def update(self, lr: float, max_grad_norm: float | None, take: Take | None = None) -> Tensor:
        gradients = [_local(p.grad) for p in self.trainable.values() if p.grad is not None]
        norm = self._step(lr, max_grad_norm, gradients, self._norm(gradients), take)
        self.optimizer.zero_grad()
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Of the whole gradient, of which each rank has a part."""
        return self.world.sum_(gradient_norm(gradients).square_()).sqrt_()

    def load(self, folder: Path, step: int | None) -> None:
        """A forward pass may have left weights gathered, which the next one would use in place of these."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        super().load(folder, step)

    def gather_full(self, parameter: nn.Parameter) -> Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class Replicated(Fsdp):
    """DDP for weights that are stepped in fp32 and used in 16 bits: every rank is a mesh's only shard.

    Under autocast every weight would be cast where it is used, and norms of fp32 would make all activations
    between the layers fp32. Here a layer's weights are cast together, and activations stay in 16 bits.
    """

    def _mesh(self, world: World) -> DeviceMesh:
        sizes, names = (world.world_size, 1), ("replicate", "shard")
        return init_device_mesh(world.device.type, sizes, mesh_dim_names=names)

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """Gradients are summed over the ranks once, after the last micro batch."""
        self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        return super().forward_backward(batch, n_labels, last=last)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return gradient_norm(gradients)


def _sum_gradients(module: FSDPModule) -> None:
    """Over the ranks, as the loss is normalised already; FSDP's default is their mean."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
