"""From rank 0's model to one that is spread over the ranks, without a whole copy on each of them.

Rank 0 alone reads a sharded strategy's model; the others build it on torch's meta device. Large
empty tensors take no memory until something is written to them, so a rank never holds more than
its own shards and what is just being shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydist.training.world import World


def materialize(model: nn.Module) -> None:
    """Collective: an empty tensor on the CPU for each that is on meta, in rank 0's dtype; ties stay."""
    dtypes = [[tensor.dtype for tensor in _tensors(model)]]
    dist.broadcast_object_list(dtypes, src=0)
    pairs = zip(_tensors(model), dtypes[0], strict=True)
    made = {id(old): _empty_like(old, dtype) for old, dtype in pairs if old.is_meta}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    store[name] = made[id(tensor)]  # type: ignore[assignment]


def broadcast_weights(module: nn.Module) -> None:
    """Collective: rank 0's parameters and buffers, as far as they are not sharded yet, into the others'."""
    for tensor in _tensors(module):
        if not hasattr(tensor, "device_mesh"):
            dist.broadcast(tensor.detach(), src=0)


def full_state(
    module: nn.Module, whole: Callable[[nn.Parameter], Tensor], world: World, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Collective: on rank 0 the state to save, on the CPU, a tensor at a time; elsewhere nothing.

    dtype: of floating tensors; None keeps each in its own and leaves out what was not trained. Tied
    tensors appear once. whole: gathers one parameter, on all ranks alike.
    """
    state = {}
    for name, parameter in module.named_parameters():
        if dtype is not None or parameter.requires_grad:
            tensor = whole(parameter)
            if world.is_main:
                state[name] = _on_cpu(tensor, dtype)
    if world.is_main and dtype is not None:
        state.update({name: _on_cpu(buffer, dtype) for name, buffer in _saved_buffers(module)})
    return state


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _empty_like(old: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(old.shape, dtype=dtype)
    return nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
