"""Weights in 4 or 8 bits as bytes, and a linear layer of them.

int4 is bitsandbytes' NF4 with scales in 8 bits (Dettmers et al. 2023, arXiv:2305.14314), int8 its row-wise
absolute maximum.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, SCALES_BLOCK = 64, 256
"""int4: weights that share a scale of 8 bits, and those scales that share one of 32 bits."""
ALIGNED = 16
"""Bytes: numbers of any size can be read at such places, and the whole can be seen as numbers of any size."""


class Quantized(nn.Module):
    """A frozen matrix (out_features, in_features) of 4 or 8 bits.

    weight: uint8 (bytes, 1), two weights to a byte in int4.  scales: uint8 (bytes,), all that turns them into
    numbers again. Both are bytes whatever they hold, so no cast of the model changes them, and FSDP2 and
    DeepSpeed send and shard them as they are. A sharding strategy may hold the same bytes in another dtype.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    in_features: int
    out_features: int
    bits: str

    def store_as(self, dtype: torch.dtype) -> None:
        """Hold the same bytes in `dtype`, for a sharding strategy that would cast any other."""
        weight = self.weight.detach().flatten().view(dtype).unsqueeze(1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(self.scales.detach().view(dtype), requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        return _dequantized(self.weight, self.scales, self.out_features, self.in_features, self.bits, dtype)


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc]  # whose weight may be any tensor
    """x W^T + b with a quantized W."""

    def __init__(self, layer: nn.Module) -> None:
        """layer: a Linear4bit or Linear8bitLt of bitsandbytes, whose storage is taken over."""
        nn.Module.__init__(self)  # nn.Linear's would make a weight, and draw random numbers for it
        weight: Any = layer.weight
        self.in_features, self.out_features = layer.in_features, layer.out_features  # type: ignore[assignment]
        self.bits = "int8" if getattr(weight, "quant_state", None) is None else "int4"
        scales = to_bytes(weight.SCB) if self.bits == "int8" else scales_of_int4(weight.quant_state)
        self.weight = nn.Parameter(to_bytes(weight.data).unsqueeze(1), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear's, also under autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _product(x, self.weight, self.scales, self.out_features, self.bits)
        return out if self.bias is None else out + self.bias.to(out.dtype)


# One operator for dequantization and product, so that a compiler sees neither inside. It would otherwise find
# that forward and backward pass dequantize the same, and keep the weight of every layer in between.


@torch.library.custom_op("raydist::quantized_linear", mutates_args=())
def _product(x: Tensor, weight: Tensor, scales: Tensor, out_features: int, bits: str) -> Tensor:
    """(..., in) -> (..., out), in the dtype of x."""
    return F.linear(x, _dequantized(weight, scales, out_features, x.shape[-1], bits, x.dtype))


@_product.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, out_features: int, bits: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("raydist::quantized_linear_backward", mutates_args=())
def _product_backward(
    upstream: Tensor, weight: Tensor, scales: Tensor, in_features: int, bits: str
) -> Tensor:
    """(..., out) -> (..., in): the gradient of x. The frozen weight has none."""
    rows = upstream.shape[-1]
    return upstream @ _dequantized(weight, scales, rows, in_features, bits, upstream.dtype)


@_product_backward.register_fake
def _(upstream: Tensor, weight: Tensor, scales: Tensor, in_features: int, bits: str) -> Tensor:
    return upstream.new_empty((*upstream.shape[:-1], in_features))


def _keep_bytes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scales, _, ctx.bits = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(weight, scales)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    found: Tensor = _product_backward(upstream, *ctx.saved_tensors, ctx.in_features, ctx.bits)
    return found, None, None, None, None


_product.register_autograd(_backward, setup_context=_keep_bytes)


# --- bytes


def stored_bytes(out_features: int, in_features: int, bits: str) -> int:
    """Of a QuantizedLinear without its bias."""
    weights = out_features * in_features
    if bits == "int8":
        return _aligned(weights) + _aligned(4 * out_features)
    n_scales = math.ceil(weights / BLOCK)
    return _aligned(math.ceil(weights / 2)) + _aligned(n_scales) + _aligned(4 * _numbers_of_int4(n_scales))


def _numbers_of_int4(n_scales: int) -> int:
    """The scales' own scales, and their mean."""
    return math.ceil(n_scales / SCALES_BLOCK) + 1


def _aligned(n_bytes: int) -> int:
    return math.ceil(n_bytes / ALIGNED) * ALIGNED


def to_bytes(tensor: Tensor) -> Tensor:
    """uint8 (n,), padded."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    padding = _aligned(len(flat)) - len(flat)
    return F.pad(flat, (0, padding)) if padding else flat


def scales_of_int4(state: Any) -> Tensor:
    """state: bitsandbytes' QuantState of NF4 whose scales are quantized too."""
    numbers = torch.cat([state.state2.absmax.flatten(), state.offset.reshape(1)])
    return torch.cat([to_bytes(state.absmax), to_bytes(numbers)])


def _dequantized(
    weight: Tensor, scales: Tensor, out_features: int, in_features: int, bits: str, dtype: torch.dtype
) -> Tensor:
    """(out, in), made in `dtype` at once."""
    packed, scales = weight.flatten().view(torch.uint8), scales.view(torch.uint8)
    n_weights = out_features * in_features
    if bits == "int8":
        values = packed[:n_weights].view(torch.int8).view(out_features, in_features)
        factors = scales[: 4 * out_features].view(torch.float32).unsqueeze(1) / 127
        if values.is_cuda:  # in one pass, where a CPU takes 30 times as long as below
            return torch.mul(values, factors, out=torch.empty_like(values, dtype=dtype))
        return values.to(torch.float32).mul_(factors).to(dtype)
    from bitsandbytes.functional import dequantize_4bit  # noqa: F401 - defines the operators below

    n_scales = math.ceil(n_weights / BLOCK)
    start = _aligned(n_scales)
    numbers = scales[start : start + 4 * _numbers_of_int4(n_scales)].view(torch.float32)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        scales[:n_scales], numbers[:-1], _codebook(weight.device), SCALES_BLOCK, torch.float32
    )
    absmax += numbers[-1]
    shape = [out_features, in_features]
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed[: math.ceil(n_weights / 2)].unsqueeze(1), absmax, BLOCK, "nf4", shape, dtype
    )
    return made


@functools.cache
def _codebook(device: torch.device) -> Tensor:
    """The 256 numbers, fp32, that the bytes of scales stand for."""
    from bitsandbytes.functional import create_dynamic_map

    codebook: Tensor = create_dynamic_map().to(device, torch.float32)  # type: ignore[no-untyped-call]
    return codebook
