"""The parts of a model: within what wraps it, and its layers, as its own class names them."""

from __future__ import annotations

from torch import nn


def bare_of(model: nn.Module) -> nn.Module:
    """The model as transformers made it, within what trains it (DDP, DeepSpeed's engine) and its adapter."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    base = getattr(model, "get_base_model", None)
    bare: nn.Module = model if base is None else base()
    return bare


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model's own class says not to split; none: it is gathered as a whole.

    FSDP2 gives a sharded module a class of its own, below that of the model.
    """
    kinds = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]
