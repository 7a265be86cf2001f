"""From rank 0's model to one that is spread over the ranks, without a whole copy on each of them.

Rank 0 alone reads the model of a strategy that shards; the others build it on torch's meta device. Large
empty tensors take no memory until they are written to, so a rank never holds more than its own shards
and the layer that is being shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn


def materialize(model: nn.Module) -> None:
    """Collective: replace each tensor on meta by an empty one on the CPU, in rank 0's dtype. Ties stay."""
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
    """Collective: copy rank 0's parameters and buffers to the others, except those already sharded."""
    for tensor in _tensors(module):
        if not hasattr(tensor, "device_mesh"):
            dist.broadcast(tensor.detach(), src=0)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _empty_like(old: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(old.shape, dtype=dtype)
    return nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
