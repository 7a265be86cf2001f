"""The parts of a model: within what wraps it, and its layers, as its own class names them."""

from __future__ import annotations

from typing import Any

from torch import nn


def bare_of(model: nn.Module) -> nn.Module:
    """The model as transformers made it, within what trains it (DDP, DeepSpeed's engine) and its adapter."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base = getattr(model, "get_base_model", None)
    bare: nn.Module = model if base is None else base()
    return bare


def text_config(config: Any) -> Any:
    """The settings of the text side: a part of a multimodal model's configuration, else all of it."""
    return config.get_text_config(decoder=True)


def layer_configs(text: Any) -> list[Any]:
    """The settings of each layer. They differ in families such as Gemma 4, where those of all raise."""
    return [text.per_layer_config[index] for index in range(text.num_hidden_layers)]


def has_experts(config: Any) -> bool:
    """Whether layers of the model are mixtures of experts."""
    first = layer_configs(text_config(config))[0]
    return any(hasattr(first, name) for name in ("num_local_experts", "num_experts"))


def heads_of(layer: Any) -> tuple[int, int, int, int]:
    """Of a layer's settings: heads of queries, heads of keys, and how wide a key and a value are."""
    heads = getattr(layer, "num_attention_heads", None) or 0
    width = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    key, value = (getattr(layer, name, None) or width for name in ("qk_head_dim", "v_head_dim"))
    return heads, getattr(layer, "num_key_value_heads", None) or heads, key, value


def not_of_text(model: nn.Module) -> list[str]:
    """Paths of the modules of a multimodal model that text does not pass through, such as a vision tower."""
    if text_config(model.config) is model.config:
        return []
    bare: Any = model
    used = (bare.get_decoder(), bare.get_input_embeddings(), bare.get_output_embeddings())
    of_text = {id(inner) for part in used if part is not None for inner in part.modules()}
    around = {id(module) for module in model.modules() if any(id(m) in of_text for m in module.modules())}
    others = [name for name, module in model.named_modules() if id(module) not in around and name]
    return [name for name in others if name.rpartition(".")[0] not in others]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model's own class says not to split; none: it is gathered as a whole.

    FSDP2 gives a sharded module a class of its own, below that of the model.
    """
    kinds = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]
