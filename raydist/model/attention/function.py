"""What attention functions of our own have in common, and how transformers calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from raydist.errors import ModelError

Known = TypeVar("Known")
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "dropout")
"""Arguments of a layer that change what attention computes. A function takes out those that it knows."""


def require_plain(module: nn.Module, kwargs: Mapping[str, Any], *, handed_over: Known | None) -> Known:
    """`handed_over`. Raises ModelError for a layer that asks for something else than causal attention.

    kwargs: what the layer passed and the function does not know. handed_over: what it needs to know of the
    documents; None where the layer did not pass it on.
    """
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked or handed_over is None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} does not attend as this function does",
            why=f"it asks for {', '.join(asked)}"
            if asked
            else "it is not causal, or does not pass on what it does not know (**kwargs)",
        )
    return handed_over
