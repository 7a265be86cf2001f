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
    """The model with a LoRA adapter, and with the modules that are trained whole next to it.

    Of a multimodal model only the text side gets the adapter.

    Raises ModelError for unknown modules, with the known ones, and for what peft refuses.
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
        adapted: nn.Module = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        why = first_line(error)
        of_dropout = lora.dropout != 0 and "dropout" in why
        raise ModelError(
            f"peft cannot put this adapter on {type(model).__name__}",
            where="adapter.dropout" if of_dropout else "adapter",
            why=why,
            fix="set adapter.dropout: 0" if of_dropout else "choose other adapter.target_modules",
        ) from error
    if lora.modules_to_save:
        config.modules_to_save = _train_whole(model, lora.modules_to_save)
    return adapted


def _train_whole(model: nn.Module, names: list[str]) -> list[str]:
    """Make the base's own modules of these names trainable, in fp32; and return the names that peft loads by.

    peft would train copies of them: twice the memory, and a head that is tied to the embedding no more. So
    the files are peft's, and the training is not. A name stands for every path that ends with it, as in peft.
    What a module is tied to is trained along with it, and saved by its own name as well.
    """
    modules = {path: m for path, m in model.named_modules() if path.endswith(tuple(names))}
    if missing := [name for name in names if not any(path.endswith(name) for path in modules)]:
        known = [path for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
        heads = [path for path, m in model.named_modules() if m is model.get_output_embeddings()]  # type: ignore[operator]
        raise ModelError(
            f"the model has no module named {', '.join(missing)}",
            where="adapter.modules_to_save",
            fix=f"its embeddings and head are {', '.join([*known, *heads])}",
        )
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            if "lora_" in name or not parameter.is_floating_point():
                kind = "gets an adapter as well" if "lora_" in name else "is quantized"
                raise ModelError(
                    f"{path} cannot be trained whole: it {kind}",
                    where="adapter.modules_to_save",
                    fix=f"leave {path.rpartition('.')[2]} out here, or out of adapter.target_modules",
                )
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    trained = [n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False) if whole(n, p)]
    others = [path for path in trained if not any(f"{path}.".startswith(f"{of}.") for of in modules)]
    return [*names, *dict.fromkeys(others)]


def whole(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a model with an adapter is the base's own, and trained."""
    return parameter.requires_grad and "lora_" not in name


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


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer as it is, of no class of its own: bitsandbytes quantizes these alone."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


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
        if is_plain(module) and kept.isdisjoint(path.split(".")):
            found |= dict.fromkeys(module.parameters(recurse=False))
        else:
            others.update(module.parameters(recurse=False))
    return (weight for weight in found if weight not in others)
