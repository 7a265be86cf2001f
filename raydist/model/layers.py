"""The layers of a model, as its own class names them."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model's own class says not to split; none: it is gathered as a whole."""
    kinds = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in kinds]
