"""The experts of a mixture in 4 or 8 bits: frozen weights that are one tensor for all experts of a layer.

transformers holds the experts of a layer in tensors of three dimensions and computes with them in several
ways. Whichever it is, its own forward pass gets the numbers that the bytes stand for, made for this pass
alone: activation checkpointing makes them again for the backward pass. So of all layers one is dequantized
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydist.model.quantized import Quantized, scales_of_int4, stored_bytes, to_bytes

_HELD = "{}_quantized"
"""The module that holds a weight of this name."""


class QuantizedExperts(Quantized):
    """A weight of shape (experts, rows, columns), quantized as one matrix (experts * rows, columns)."""

    def __init__(self, weight: Tensor, bits: str, device: torch.device) -> None:
        """weight: on any device; on meta only the sizes are right."""
        super().__init__()
        self.shape, self.bits = weight.shape, bits
        matrix = weight.detach().flatten(0, 1)
        self.out_features, self.in_features = matrix.shape
        packed, scales = _quantize(matrix.to(device), bits)
        self.weight = nn.Parameter(packed.unsqueeze(1), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """(experts, rows, columns)."""
        return self.dequantized(dtype).view(self.shape)


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Path, module and names of weights of each layer's experts that are one tensor."""
    for path, module in model.named_modules():
        if getattr(module, "num_experts", None):
            names = [name for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
            if names:
                yield path, module, names


def quantize_experts(model: nn.Module, bits: str, device: torch.device) -> None:
    """Replace the experts' weights by their bytes on `device`, in place, a tensor at a time."""
    for _, module, names in list(experts_of(model)):
        for name in names:
            weight = module._parameters.pop(name)
            assert weight is not None
            module.add_module(_HELD.format(name), QuantizedExperts(weight, bits, device))
        module.forward = partial(_forward, module, module.forward, names)


def quantized_experts(model: nn.Module) -> list[str]:
    """Paths of the modules whose weights `quantize_experts` has replaced."""
    held = [path for path, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    return list(dict.fromkeys(path.rpartition(".")[0] for path in held))


def dequantize_into(plain: nn.Module, quantized: nn.Module) -> None:
    """Give the experts of `plain` the numbers that the bytes of `quantized` stand for."""
    for path, module in quantized.named_modules():
        if isinstance(module, QuantizedExperts):
            parent, _, name = path.rpartition(".")
            weight: Any = getattr(plain.get_submodule(parent), name.removesuffix(_HELD.format("")))
            weight.data.copy_(module(weight.dtype))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(experts: nn.Module, forward: Any, names: list[str], *args: Any, **kwargs: Any) -> Any:
    hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype

    def run(*args: Any, **kwargs: Any) -> Any:
        held = experts.__dict__
        try:
            for name in names:
                held[name] = experts.get_submodule(_HELD.format(name))(dtype)
            return forward(*args, **kwargs)
        finally:
            for name in names:
                held.pop(name, None)

    if torch.is_grad_enabled():
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return run(*args, **kwargs)


def _quantize(matrix: Tensor, bits: str) -> tuple[Tensor, Tensor]:
    """Bytes of the weights and of their scales."""
    if matrix.is_meta:
        rows, columns = matrix.shape
        n_bytes = stored_bytes(rows, columns, bits)
        packed = torch.empty(n_bytes, dtype=torch.uint8, device="meta")
        return packed, packed[:0]
    from bitsandbytes import functional

    if bits == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        return to_bytes(values), to_bytes(scales.float())
    values, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    return to_bytes(values), scales_of_int4(state)
