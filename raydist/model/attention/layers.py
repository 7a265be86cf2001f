"""What the layers of a model ask of their attention: a window, by the configuration and by their calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raydist.errors import ModelError, first_line
from raydist.model.layers import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Window = int | None
"""How many tokens a query sees, itself included; None: its whole document."""


@dataclass(frozen=True)
class Asked:
    """windows: of each call, in the order of the layers.  sinks: whether a query may attend to nothing."""

    windows: tuple[Window, ...] = ()
    sinks: bool = False


def windows_of(config: PretrainedConfig) -> list[Window]:
    """The window of each layer, by the configuration.

    Raises ModelError where a layer sees anything else than its document or a window.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        if others := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ModelError(f"layers of this model have {', '.join(sorted(others))}")
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if getattr(config, "attention_chunk_size", None):
        raise ModelError("layers of this model attend within chunks")
    used = window if getattr(config, "use_sliding_window", True) else None
    return [used] * int(config.num_hidden_layers)


@torch.no_grad()
def asked_by_layers(model: nn.Module) -> Asked:
    """What the layers of the bare `model` pass to their attention, in a forward pass of four tokens.

    The model needs another attention afterwards. Raises ModelError where that pass fails.
    """
    from transformers import AttentionInterface

    windows: list[Window] = []
    sinks: list[bool] = []

    def listen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **asked: Any
    ) -> tuple[Tensor, None]:
        windows.append(asked.get("sliding_window"))
        sinks.append(asked.get("s_aux") is not None)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_LISTENING, listen)
    model.set_attn_implementation(_LISTENING)  # type: ignore[operator]
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    was_training = model.training
    try:
        model.eval()(input_ids=ids, position_ids=ids, use_cache=False)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"its layers do not take an attention of ours: {first_line(error)}") from error
    finally:
        model.train(was_training)
    return Asked(tuple(windows), any(sinks))


_LISTENING = "raydist_listening"
