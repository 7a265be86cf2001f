"""The fastest attention that a device and a model have, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    PretrainedConfig,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from raydist.errors import ModelError, first_line
from raydist.model.attention.documents import FLASH, give_documents
from raydist.model.attention.flex import FLEX, check_flex, flex_attention_forward
from raydist.model.attention.layers import asked_by_layers, windows_of
from raydist.model.attention.masks import MASKED
from raydist.model.attention.per_document import PER_DOCUMENT, per_document_attention
from raydist.model.attention.probe import not_runnable, probe
from raydist.model.layers import layers_of, text_config

AUTO = {"cpu": (PER_DOCUMENT, "sdpa", "eager"), "cuda": (FLEX, "sdpa", "eager")}
"""By speed. Not every model has SDPA; all have eager attention. On one H200 a layer's attention took 2.3 ms
with flex and 3.3 with SDPA's mask (64 rows of 1,024 tokens), 2.6 and 6.4 (2 rows of 4,096)."""

NAMES = (PER_DOCUMENT, FLEX, "sdpa", "eager", FLASH)


@dataclass(frozen=True)
class Chosen:
    """name: one of NAMES.  masked: documents are put into the masks that transformers makes.

    passed_over: faster kinds that this model or device does not have, and why.
    """

    name: str
    masked: bool = False
    passed_over: dict[str, str] = field(default_factory=dict)


def set_attention(
    model: nn.Module,
    device: torch.device,
    *,
    document_mask: bool,
    asked: str = "auto",
    compiled: bool = False,
) -> Chosen:
    """Give `model` the fastest attention for `device` with which it passes the probe.

    asked: that one and no other. compiled: the layers will be. Raises ModelError, what the probe said of the
    plainest one, when there is none, or what is wrong with the one that was asked for.
    """
    if asked != "auto":
        return Chosen(asked, _set_this(model, asked, device, document_mask=document_mask))
    passed_over: dict[str, str] = {}
    for name in AUTO.get(device.type, AUTO["cpu"][1:]):
        try:
            _check_candidate(name, model, device, document_mask=document_mask, compiled=compiled)
            masked = _use_and_probe(model, name, document_mask=document_mask)
            taken = str(model.config._attn_implementation)  # type: ignore[union-attr]
            return Chosen(taken, masked, passed_over)
        except (ModelError, ValueError, KeyError, ImportError) as error:
            refusal = error
            passed_over[name] = first_line(error)
    if isinstance(refusal, ModelError):
        raise refusal
    raise not_runnable(model, refusal) from refusal


def _use_and_probe(model: nn.Module, name: str, *, document_mask: bool, bf16: bool = False) -> bool:
    """Whether the documents are in the mask: only where the model does not find them in position_ids."""
    use_attention(model, name)
    try:
        probe(model, document_mask=document_mask, bf16=bf16)
        return False
    except ModelError:
        if name not in MASKED or not document_mask:
            raise
    use_attention(model, name, masked=True)
    probe(model, document_mask=True, bf16=bf16)
    return True


def _check_candidate(
    name: str, model: nn.Module, device: torch.device, *, document_mask: bool, compiled: bool = False
) -> None:
    """Raises ModelError for one of ours that is not for this model, or does not run on this device."""
    if name not in (PER_DOCUMENT, FLEX):
        return
    config = text_config(model.config)
    windows = windows_of(config)
    if name == PER_DOCUMENT:
        if any(windows):
            raise ModelError("layers of this model see a window, which is left to transformers' masks")
        if compiled:
            raise ModelError("compiled layers would be compiled again for each batch, whose documents differ")
    if name == FLEX:
        if not document_mask and not any(windows):
            raise ModelError("every row is one document, for which SDPA's own causal kernel is faster")
        if getattr(config, "kv_lora_rank", None):
            raise ModelError("keys and values of this model have different widths")
        asked = asked_by_layers(model)
        if list(asked.windows) != windows and (any(windows) or any(asked.windows)):
            raise ModelError("layers of this model do not say which window they see")
        check_flex(config, device, asked)


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


def _set_this(model: nn.Module, name: str, device: torch.device, *, document_mask: bool) -> bool:
    try:
        use_attention(model, name)
        if (chosen := model.config._attn_implementation) != name:  # type: ignore[union-attr]
            raise ValueError(f"transformers takes {chosen} for {type(model).__name__} instead")
        with _on(device, model) if name == FLASH else nullcontext():
            return _use_and_probe(model, name, document_mask=document_mask, bf16=name == FLASH)
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


def use_attention(model: nn.Module, name: str, *, masked: bool = False) -> None:
    """Give the bare `model` this attention, unprobed. masked: as `give_documents` has it.

    transformers makes no mask for ours, which have none registered. With one that returns None it would
    still look for documents in position_ids, and so wait for a GPU in every forward pass.
    """
    for own, function in ((PER_DOCUMENT, per_document_attention), (FLEX, flex_attention_forward)):
        AttentionInterface.register(own, function)
    model.set_attn_implementation(name)  # type: ignore[operator]
    give_documents(model, name, masked=masked)
