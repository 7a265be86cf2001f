"""The fastest attention that a device and a model have, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from raydist.errors import ModelError
from raydist.model.attention.documents import FLASH, give_documents
from raydist.model.attention.per_document import PER_DOCUMENT, no_mask, per_document_attention
from raydist.model.attention.probe import not_runnable, probe
from raydist.model.layers import layers_of

AUTO = (PER_DOCUMENT, "sdpa", "eager")
"""By speed. Ours is for the CPU; not every model has SDPA; all have eager attention."""

NAMES = (*AUTO, FLASH)


def set_attention(model: nn.Module, device: torch.device, *, document_mask: bool, asked: str = "auto") -> str:
    """Give `model` the fastest attention for `device` with which it passes the probe; one of NAMES.

    asked: that one and no other. Raises ModelError, what the probe said of the plainest one, when there
    is none, or what is wrong with the one that was asked for.
    """
    if asked != "auto":
        _set_this(model, asked, device, document_mask=document_mask)
        return asked
    for name in AUTO if device.type == "cpu" and not _is_windowed(model.config) else AUTO[1:]:  # type: ignore[arg-type]
        try:
            use_attention(model, name)
            probe(model, document_mask=document_mask)
            return str(model.config._attn_implementation)  # type: ignore[union-attr]
        except (ModelError, ValueError, KeyError, ImportError) as error:
            refusal = error
    if isinstance(refusal, ModelError):
        raise refusal
    raise not_runnable(model, refusal) from refusal


def check_attention(name: str, device_type: str, *, on_worker: bool = False) -> None:
    """Refuse, before weights are loaded, what cannot run there. on_worker: this process will run it."""
    if name == FLASH and device_type != "cuda":
        raise _refused(name, f"it runs on GPUs, and the workers are on {device_type.upper()}")
    if name == FLASH and on_worker and not is_flash_attn_2_available():
        # transformers would take a kernel from the hub instead
        raise _refused(name, "the package flash-attn is not installed there, or not made for this GPU")


def check_model_attention(config: PretrainedConfig, name: str) -> None:
    """Refuse, by its configuration alone, a model that does not have this attention."""
    flag = {"sdpa": "_supports_sdpa", FLASH: "_supports_flash_attn"}.get(name)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if flag is not None and not getattr(kind, flag, False):
        raise _refused(name, f"a model of type {config.model_type} has none such in transformers")


def _set_this(model: nn.Module, name: str, device: torch.device, *, document_mask: bool) -> None:
    try:
        use_attention(model, name)
        if (chosen := model.config._attn_implementation) != name:  # type: ignore[union-attr]
            raise ValueError(f"transformers takes {chosen} for {type(model).__name__} instead")
        with _on(device, model) if name == FLASH else nullcontext():
            probe(model, document_mask=document_mask, bf16=name == FLASH)
    except (ModelError, ValueError, KeyError, ImportError) as error:
        raise _refused(name, str(error)) from error


def _refused(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} cannot be used as asked",
        where="model.attn_implementation",
        why=why.strip(),
        fix="name another one, or take auto",
    )


@contextmanager
def _on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Run `model` on `device`, a layer at a time if it lies elsewhere: it may be too big for it."""
    home = next(model.parameters()).device
    if home.type == device.type:
        yield
        return

    def come(module: nn.Module, *_: Any) -> None:
        module.to(device)

    def go(module: nn.Module, *_: Any) -> None:
        module.to(home)

    layers = layers_of(model)
    hooks = [
        hook for m in layers for hook in (m.register_forward_pre_hook(come), m.register_forward_hook(go))
    ]
    within = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in within:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    try:
        yield
    finally:
        model.to(home)
        for hook in hooks:
            hook.remove()


def use_attention(model: nn.Module, name: str) -> None:
    """Give the bare `model` this attention, unprobed."""
    AttentionInterface.register(PER_DOCUMENT, per_document_attention)
    AttentionMaskInterface.register(PER_DOCUMENT, no_mask)
    model.set_attn_implementation(name)  # type: ignore[operator]
    give_documents(model, name)


def _is_windowed(config: PretrainedConfig) -> bool:
    """Layers that see less than the whole document need transformers' own masks."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return any(layer != "full_attention" for layer in layers)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return window is not None and getattr(config, "use_sliding_window", True)
