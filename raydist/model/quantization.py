"""A frozen base in 4 or 8 bits, stored by bitsandbytes, under a LoRA adapter that is trained (QLoRA).

Every product uses the dequantized weight: in training, in evaluation and in the merged model. The kernels
of bitsandbytes differ from each other: in evaluation its int8 also rounds activations (LLM.int8(): 15% of
the largest logit on a 135M model), and its int4 computes in bf16 on some CPUs (2%).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydist import files
from raydist.errors import JobError, ModelError, first_line
from raydist.job.schema import Job
from raydist.model.adapter import is_linear
from raydist.model.base import load_base
from raydist.model.precision import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "quantization_config.json"
"""A file next to the adapter that says how its base was quantized."""

BYTES = {"int4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes per weight. int4 has an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those."""


def check_quantization(config: PretrainedConfig, job: Job) -> None:
    """Raises JobError when the base of `config` is quantized already."""
    if job.quantization is not None and getattr(config, "quantization_config", None) is not None:
        raise JobError(
            f"the base {job.model.base} is quantized already",
            where="quantization",
            why="its config.json has a quantization_config, and weights are not quantized twice",
            fix="set model.base to the base that it was made from",
        )


def check_bitsandbytes(device: torch.device) -> None:
    """Raises ModelError when bitsandbytes is missing or cannot quantize on `device`."""
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(
            f"bitsandbytes cannot quantize on {device} here",
            where="quantization",
            why=first_line(error),
            fix="install bitsandbytes>=0.50 and see what python -m bitsandbytes says; or quantization: null",
        ) from error


def quantization_config(job: Job) -> dict[str, Any]:
    """Arguments of transformers' BitsAndBytesConfig: NF4 with its scales in 8 bits, or int8."""
    if job.quantization == "int8":
        return {"load_in_8bit": True}
    compute = str(DTYPES[job.train.mixed_precision]).removeprefix("torch.")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"load_in_4bit": True, **nf4, "bnb_4bit_compute_dtype": compute}


def load_quantized(base: str, config: dict[str, Any], device: torch.device, **options: Any) -> nn.Module:
    """The base on `device`: every linear layer except the output head is quantized, the rest is fp32.

    It is put there while it is loaded, because int8 weights lose their scales when a model is moved later.
    """
    from transformers import BitsAndBytesConfig

    check_bitsandbytes(device)
    options |= {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": str(device)}}
    model: nn.Module = load_base(base, dtype=torch.float32, **options)
    for _, layer in _quantized_layers(model):
        layer.forward = MethodType(_forward, layer)
    return model


def load_dequantized(base: str, config: dict[str, Any], **options: Any) -> nn.Module:
    """The base in fp32, made of plain layers that hold the dequantized values."""
    plain: nn.Module = load_base(base, dtype=torch.float32, **options)
    for name, layer in _quantized_layers(load_quantized(base, config, torch.device("cpu"), **options)):
        target, weight = plain.get_submodule(name), dequantized(layer, torch.float32)
        # GPT-2's Conv1D holds its weight as (in, out)
        target.weight.data.copy_(weight if isinstance(target, nn.Linear) else weight.T)  # type: ignore[operator]
    return plain


def base_bytes(model: nn.Module, job: Job) -> int:
    """Memory of a frozen base: in its own dtype, or with quantized linear layers and the rest in fp32."""
    total, config = sum(p.numel() for p in model.parameters()), model.config
    if job.quantization is None:
        return total * getattr(config.dtype, "itemsize", 4)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear: int = sum(m.weight.numel() for m in model.modules() if is_linear(m) and m is not head)  # type: ignore[misc, operator]
    return round(linear * BYTES[job.quantization]) + 4 * (total - linear)


def write_config(job: Job, folder: Path) -> None:
    """Written next to an adapter, for whoever loads it, if its base was quantized."""
    if job.quantization is not None:
        files.write_json(folder / CONFIG, quantization_config(job))


def read_config(folder: Path) -> dict[str, Any] | None:
    """How the base of the adapter in `folder` was quantized; None when it was not."""
    return files.read_json(folder / CONFIG) if (folder / CONFIG).exists() else None


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return ((name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt))


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a quantized layer, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.data.to(dtype).mul_(weight.SCB.unsqueeze(1) / 127)  # type: ignore[no-any-return]
    state = copy.copy(state)
    state.dtype = dtype
    return dequantize_4bit(weight.data, state)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of nn.Linear, also under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return out if layer.bias is None else out + layer.bias.to(out.dtype)  # type: ignore[operator]


class _Product(torch.autograd.Function):
    """x W^T with a frozen W, which is dequantized for each use, so that no layer keeps a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantized(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] @ dequantized(ctx.layer, upstream[0].dtype), None
