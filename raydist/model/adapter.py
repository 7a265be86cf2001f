"""LoRA by peft: the base is frozen in its own dtype, the adapter is trained in fp32."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from raydist.errors import ModelError, first_line
from raydist.job.schema import Lora
from raydist.model.experts import quantized_experts
from raydist.model.layers import not_of_text


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """The model with a LoRA adapter; of a multimodal one only the text side gets it.

    Raises ModelError for unknown target modules, with the known ones, and for what peft refuses.
    """
    from peft import LoraConfig, get_peft_model

    others = not_of_text(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=_target_modules(model, lora),
        exclude_modules=rf"({'|'.join(map(re.escape, others))})\..*" if others else None,
    )
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        why = first_line(error)
        of_dropout = lora.dropout != 0 and "dropout" in why
        raise ModelError(
            f"peft cannot put this adapter on {type(model).__name__}",
            where="adapter.dropout" if of_dropout else "adapter",
            why=why,
            fix="set adapter.dropout: 0" if of_dropout else "choose other adapter.target_modules",
        ) from error


def _target_modules(model: nn.Module, lora: Lora) -> str | list[str]:
    if lora.target_modules == "all-linear":
        return _plain_linear(model) if quantized_experts(model) else "all-linear"
    asked = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    paths = [name for name, module in model.named_modules() if is_linear(module)]
    missing = [name for name in asked if not any(p == name or p.endswith(f".{name}") for p in paths)]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in paths})
        raise ModelError(
            f"the model has no linear module named {', '.join(missing)}",
            where="adapter.target_modules",
            fix=f"choose from {', '.join(known)}; or all-linear",
        )
    return asked


OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names that peft takes for those of experts in any mixture, also where a dense layer has them."""


def _plain_linear(model: nn.Module) -> list[str]:
    """Names of linear layers but the head and OF_EXPERTS: peft cannot adapt experts that are bytes."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    paths = [path for path, module in model.named_modules() if is_linear(module) and module is not head]
    return sorted({path.rpartition(".")[2] for path in paths} - OF_EXPERTS)


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt it. GPT-2 calls its linear layers Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of linear layers to `dtype`, in which autocast computes their products.

    The products stay the same to the last bit. autocast would cast such a weight again in each pass, since it
    keeps the casts of trained weights only, and the wider weight would take twice the memory.
    """
    for weight in product_weights(model):
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def product_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights and biases of plain linear layers that are nothing else too, such as an embedding.

    Without those that the model's class wants in fp32.
    """
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = {part for m in model.modules() for name in lists for part in getattr(m, name, None) or ()}
    found: dict[nn.Parameter, None] = {}
    others: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if plain and kept.isdisjoint(path.split(".")):
            found |= dict.fromkeys(module.parameters(recurse=False))
        else:
            others.update(module.parameters(recurse=False))
    return (weight for weight in found if weight not in others)
