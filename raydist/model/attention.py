"""Attention that does not cross the documents of a packed block, and a probe that makes sure of it.

A batch says how long its documents are (`document_lengths`), and its position_ids restart at each.
SDPA and eager attention need the positions alone: transformers makes its mask of them. On CPU one
causal call per document is faster than a mask, so this module registers such a function with
transformers. That one and flash attention get the lengths, by a hook on the model, once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from raydist.errors import ModelError
from raydist.model.layers import layers_of
from raydist.model.loss import DOCUMENTS, Documents, autocast, logits_of, to_device

PER_DOCUMENT = "raydist_per_document"
FLASH = "flash_attention_2"
AUTO = (PER_DOCUMENT, "sdpa", "eager")
"""By speed. Ours is for the CPU; not every model has SDPA; all have eager attention."""

NAMES = (*AUTO, FLASH)

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest logit. A dropped mask moves them by tens of percent."""


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
    raise _not_runnable(model, refusal) from refusal


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
    AttentionMaskInterface.register(PER_DOCUMENT, _no_mask)
    model.set_attn_implementation(name)  # type: ignore[operator]
    give_documents(model, name)


def give_documents(model: nn.Module, attention: str) -> None:
    """From now on forward passes of `model` hand the documents to `attention`, as that one takes them."""
    if (earlier := model.__dict__.get(_HOOK)) is not None:
        earlier.remove()
    hook = partial(_hand_over, attention)
    model.__dict__[_HOOK] = model.register_forward_pre_hook(hook, with_kwargs=True)


_HOOK = "_raydist_documents"


def _hand_over(
    attention: str, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: in place of document_lengths what `attention` needs; nothing, if that is a mask."""
    documents: Documents | None = inputs.get(DOCUMENTS)
    inputs = {name: value for name, value in inputs.items() if name != DOCUMENTS}
    if attention not in (PER_DOCUMENT, FLASH):
        return args, inputs
    if documents is None:
        raise ModelError(
            f"{attention} got a batch without {DOCUMENTS}",
            why="it cannot tell the documents of a block apart",
            fix="take batches from the feed as they are, and call the model through raydist.model.loss",
        )
    if attention == FLASH:
        return args, inputs | flash_arguments(documents, inputs["input_ids"].device)
    return args, {**inputs, DOCUMENTS: documents}


def flash_arguments(documents: Documents, device: torch.device) -> dict[str, Any]:
    """Where each document begins and ends, all rows one after another, as flash attention's kernel takes it.

    cu_seq_lens: int32, (documents + 1,). max_length: T, an upper bound of every batch alike. The zeros behind
    a row's documents are left out: the kernel takes sequences of no length, but starts thread blocks for each
    (65,535 at most, which B times T exceeds) and keeps 128 rows of gradient for each. That is why lengths are
    kept on the host. What is made of them is copied from pinned memory, which waits for nothing.
    """
    edges = torch.tensor([0, *accumulate(chain.from_iterable(documents))], dtype=torch.int32)
    if device.type == "cuda":
        edges = edges.pin_memory().to(device, non_blocking=True)
    longest = sum(documents[0])
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _is_windowed(config: PretrainedConfig) -> bool:
    """Layers that see less than the whole document need transformers' own masks."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return any(layer != "full_attention" for layer in layers)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return window is not None and getattr(config, "use_sliding_window", True)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def per_document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal within each document. query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D)."""
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given or document_lengths is None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} does not attend as this function does",
            why=f"it asks for {', '.join(given)}"
            if given
            else "it is not causal, or does not pass on what it does not know (**kwargs)",
        )
    options: dict[str, Any] = {"is_causal": True, "scale": scaling, "dropout_p": dropout}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if all(len(lengths) == 1 for lengths in document_lengths):
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).contiguous(), None
    out = [
        _attend_row(q, k, v, lengths, options)
        for q, k, v, lengths in zip(query, key, value, document_lengths, strict=True)
    ]
    return torch.stack(out), None


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], options: dict[str, Any]
) -> Tensor:
    """One block: (H, T, D) -> (T, H, D). `split`, not slices: its backward is one concatenation."""
    parts = [tensor.unsqueeze(0).split(lengths, dim=2) for tensor in (query, key, value)]
    out = [F.scaled_dot_product_attention(*document, **options) for document in zip(*parts, strict=True)]
    return torch.cat(out, dim=2)[0].transpose(0, 1)


@torch.no_grad()
def probe(model: nn.Module, *, document_mask: bool, bf16: bool = False) -> None:
    """Refuse, with ModelError, a model in which tokens see what they must not.

    One batch of variations on a block of two documents, A and B: whatever changes in B, or after a
    token in A, must leave its logits where they were; and B must be as it is when it comes first.
    bf16: compute in it, for attention that knows nothing else.
    """
    was_training, device = model.training, next(model.parameters()).device
    batch, first, second = _probe_batch(model, document_mask)
    try:
        with autocast(device, "bf16" if bf16 else "fp32"):
            logits = logits_of(model.eval(), to_device(batch, device)).float()
    except (TypeError, ValueError, KeyError) as error:
        raise _not_runnable(model, error) from error
    finally:
        model.train(was_training)
    base, other_second, other_first, other_last, swapped = logits
    computed_in = torch.bfloat16 if bf16 else next(model.parameters()).dtype
    limit = _PROBE_TOLERANCE[computed_in] * logits.abs().max().item()
    _same(base[: first - 1], other_last[: first - 1], limit, "a token sees the tokens after it")
    if document_mask:
        _same(base[:first], other_second[:first], limit, "a document sees the one after it")
        _same(base[first:], other_first[first:], limit, "a document sees the one before it")
        _same(base[first:], swapped[:second], limit, "a document depends on where in the block it stands")


def _not_runnable(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not take packed blocks",
        why=(str(error).strip().splitlines() or [type(error).__name__])[0],
        fix="use a decoder-only model that takes position_ids",
    )


def _probe_batch(model: nn.Module, document_mask: bool) -> tuple[dict[str, Tensor], int, int]:
    """Rows: A B, A B', A' B, A" B, B A, where A" is A but for its last token; and the lengths of A and B."""
    first, second = 9, 7
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: 2 * (first + second)]
    ids = ids.repeat(-(-2 * (first + second) // len(ids)))[: 2 * (first + second)]
    a, b, other_a, other_b = ids.split([first, second, first, second])
    last_a = torch.cat([a[:-1], other_a[-1:]])
    rows = [(a, b), (a, other_b), (other_a, b), (last_a, b), (b, a)]
    pieces = [torch.cat([torch.arange(len(part)) for part in row]) for row in rows]
    plain = torch.arange(first + second).repeat(len(rows), 1)
    positions = torch.stack(pieces) if document_mask else plain
    lengths = torch.zeros(plain.shape, dtype=torch.int32)
    lengths[:, 0] = first + second
    if document_mask:
        lengths[:, :2] = torch.tensor([[len(part) for part in row] for row in rows])
    input_ids = torch.stack([torch.cat(row) for row in rows])
    return {"input_ids": input_ids, "position_ids": positions, DOCUMENTS: lengths}, first, second


def _same(expected: Tensor, found: Tensor, limit: float, otherwise: str) -> None:
    moved = (expected - found).abs().max().item()
    if not moved <= limit:
        raise ModelError(
            f"in this model {otherwise}: logits moved by {moved:.1e}, and {limit:.1e} is allowed",
            why="documents packed into one block would be trained on each other's text, or on the answer",
            fix="use a model that honours position_ids, or let documents mix: packing.document_mask: false",
        )
