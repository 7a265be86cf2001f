"""A frozen base in 4 or 8 bits, quantized by bitsandbytes, under a LoRA adapter that is trained (QLoRA).

    base ─▶ bitsandbytes quantizes each linear layer ─▶ QuantizedLinear: bytes ─▶ dequantized for each product

Every product uses the dequantized weight: in training, in evaluation and in the merged model. The kernels
of bitsandbytes differ from each other: in evaluation its int8 also rounds activations (LLM.int8(): 15% of
the largest logit on a 135M model), and its int4 computes in bf16 on some CPUs (2%). Its fused int4 kernel
is for small batches; above 1,536 rows it dequantizes and multiplies too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydist import files
from raydist.errors import JobError, ModelError, first_line
from raydist.job.schema import Job
from raydist.model.adapter import is_plain, product_weights
from raydist.model.base import check_finite, load_base
from raydist.model.experts import dequantize_into, experts_of, quantize_experts
from raydist.model.layers import has_experts, not_of_text
from raydist.model.precision import DTYPES
from raydist.model.quantized import QuantizedLinear, stored_bytes
from raydist.model.trust import read_config as read_base_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "quantization_config.json"
"""A file next to the adapter that says how its base was quantized."""


def check_quantization(config: PretrainedConfig, job: Job) -> None:
    """Raises JobError when the base of `config` is quantized already, unless only an adapter is trained."""
    if getattr(config, "quantization_config", None) is None:
        return
    if job.quantization is not None:
        where, why = (
            "quantization",
            "its config.json has a quantization_config, and weights are not quantized twice",
        )
    elif job.adapter is None:
        where = "model.base"
        why = "quantized weights cannot be trained, and what cannot be trained would be left as it is"
    else:
        return
    raise JobError(
        f"the base {job.model.base} is quantized already",
        where=where,
        why=why,
        fix="set model.base to the base that it was made from",
    )


LEAST_SHARE = 0.75
"""Of the weights that are neither the embedding's nor the head's."""


def check_share(model: nn.Module, job: Job) -> None:
    """Raises JobError for a quantization that would leave much of the bare model as it is, also on meta.

    bitsandbytes quantizes plain linear layers, and experts are quantized here: what is left are linear layers
    of a class of their own.
    """
    if job.quantization is None:
        return
    bare: Any = model
    apart = {m for m in model.modules() if isinstance(m, nn.Embedding)} | {bare.get_output_embeddings()}
    apart |= {m for path in not_of_text(model) for m in model.get_submodule(path).modules()}
    layers = [m for m in model.modules() if m not in apart]
    weights = {p for m in layers for p in m.parameters(recurse=False)}
    total = sum(p.numel() for p in weights)
    quantized = sum(p.numel() for m in layers if is_plain(m) for p in m.parameters() if p.ndim == 2)
    quantized += sum(m.get_parameter(name).numel() for _, m, names in experts_of(model) for name in names)
    if quantized >= LEAST_SHARE * total:
        return
    raise JobError(
        f"{job.quantization} would reach {quantized / total:.0%} of the layers' weights in {job.model.base}",
        where="quantization",
        why="bitsandbytes quantizes plain linear layers; those of this model are of a class of its own",
        fix="leave quantization out: the frozen base keeps its own dtype, and strategy: fsdp shards it",
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


def load_quantized(
    base: str, config: dict[str, Any], device: torch.device, *, dtype: Any = torch.float32, **options: Any
) -> nn.Module:
    """The base on `device`: linear layers except the output head are QuantizedLinear, experts are bytes.

    dtype: of all else, or "auto" for the base's own; what is quantized does not depend on it.
    It is put there while it is loaded: large models are quantized on a GPU, a layer at a time. One with
    experts is loaded on the CPU, since bitsandbytes leaves them as they are.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig

    check_bitsandbytes(device)
    bits = "int8" if config.get("load_in_8bit") else "int4"
    mixture = has_experts(read_base_config(base))
    place = torch.device("cpu") if mixture else device
    options |= {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": str(place)}}
    model: nn.Module = load_base(base, dtype=dtype, **options)
    check_finite(model, base)
    quantize_experts(model, bits, device)
    made = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    for name, layer in made:
        model.set_submodule(name, QuantizedLinear(layer))
    return model.to(device) if mixture else model


def load_dequantized(base: str, config: dict[str, Any], **options: Any) -> nn.Module:
    """The base in fp32, made of plain layers that hold the dequantized values."""
    plain: nn.Module = load_base(base, dtype=torch.float32, **options)
    quantized = load_quantized(base, config, torch.device("cpu"), **options)
    for name, layer in quantized.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        target, weight = plain.get_submodule(name), layer.dequantized(torch.float32)
        # GPT-2's Conv1D holds its weight as (in, out)
        target.weight.data.copy_(weight if isinstance(target, nn.Linear) else weight.T)  # type: ignore[operator]
    dequantize_into(plain, quantized)
    return plain


def bytes_of_each(model: nn.Module, job: Job) -> dict[nn.Parameter, int]:
    """Memory of each weight of a frozen base, as `build_model` makes it. model: bare, not quantized yet."""
    compute, own = DTYPES[job.train.mixed_precision], getattr(model.config.dtype, "itemsize", 4)
    if job.quantization is not None and compute == torch.float32:
        own = 4
    held = {weight: weight.numel() * own for weight in model.parameters()}
    if compute != torch.float32:
        held |= {weight: weight.numel() * compute.itemsize for weight in product_weights(model)}
    if job.quantization is not None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        quantized = [m.get_parameter("weight") for m in model.modules() if is_plain(m) and m is not head]
        quantized += [module.get_parameter(name) for _, module, names in experts_of(model) for name in names]
        for weight in quantized:
            rows, columns = weight.flatten(0, -2).shape
            held[weight] = stored_bytes(rows, columns, job.quantization)
    return held


def write_config(job: Job, folder: Path) -> None:
    """Written next to an adapter, for whoever loads it, if its base was quantized."""
    if job.quantization is not None:
        files.write_json(folder / CONFIG, quantization_config(job))


def read_config(folder: Path) -> dict[str, Any] | None:
    """How the base of the adapter in `folder` was quantized; None when it was not."""
    return files.read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
