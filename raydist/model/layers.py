"""The layers of a model, as its own class names them."""

from __future__ import annotations

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model's own class says not to split; none: it is gathered as a whole.

    FSDP2 gives a sharded module a class of its own, below that of the model.
    """
    kinds = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]
