"""Attention that does not cross the documents of a packed block, and a probe that makes sure of it.

Documents are told apart by position_ids alone: a document starts wherever they do not go up by one.
On a GPU transformers turns them into SDPA's block mask. On CPU one causal call per document is
faster than a mask, so this module registers such a function with transformers. Flash attention is
given the documents' lengths: transformers finds them by itself in a batch of one row only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from raydist.model.loss import autocast, logits_of

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
    if name == FLASH:
        model.register_forward_pre_hook(add_document_lengths, with_kwargs=True)
    AttentionInterface.register(PER_DOCUMENT, per_document_attention)
    AttentionMaskInterface.register(PER_DOCUMENT, _no_mask)
    model.set_attn_implementation(name)  # type: ignore[operator]


def add_document_lengths(
    model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of all rows, one after another, as flash attention's kernel takes them; once for all layers."""
    starts = _document_starts(inputs["position_ids"]).flatten()
    edges = F.pad(starts.nonzero().flatten(), (0, 1), value=starts.numel()).int()
    longest = int(edges.diff().max())
    lengths = {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return args, {**inputs, **lengths}


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
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal within each document. query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D)."""
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given or position_ids is None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} does not attend as this function does",
            why=f"it asks for {', '.join(given)}"
            if given
            else "it is not causal, or passes no position_ids on",
        )
    options: dict[str, Any] = {"is_causal": True, "scale": scaling, "dropout_p": dropout}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    rows = _document_lengths(position_ids)
    if all(len(lengths) == 1 for lengths in rows):
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).contiguous(), None
    if len(rows) == 1:  # positions given once for the whole batch
        rows = rows * query.shape[0]
    out = [
        _attend_row(q, k, v, lengths, options)
        for q, k, v, lengths in zip(query, key, value, rows, strict=True)
    ]
    return torch.stack(out), None


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], options: dict[str, Any]
) -> Tensor:
    """One block: (H, T, D) -> (T, H, D). `split`, not slices: its backward is one concatenation."""
    parts = [tensor.unsqueeze(0).split(lengths, dim=2) for tensor in (query, key, value)]
    out = [F.scaled_dot_product_attention(*document, **options) for document in zip(*parts, strict=True)]
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that the model's own class says not to split; none: it is gathered as a whole."""
    kinds = {kind for m in model.modules() for kind in getattr(m, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _document_lengths(position_ids: Tensor) -> list[list[int]]:
    """Per row of position_ids (B, T), the lengths of its documents; they add up to T."""
    length = position_ids.shape[1]
    rows = [row.nonzero().flatten().tolist() for row in _document_starts(position_ids)]
    return [[b - a for a, b in zip(row, [*row[1:], length], strict=True)] for row in rows]


def _document_starts(position_ids: Tensor) -> Tensor:
    """Whether a document starts at each of position_ids; bool, (B, T)."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


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
            logits = logits_of(model.eval(), {k: tensor.to(device) for k, tensor in batch.items()}).float()
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
    input_ids = torch.stack([torch.cat(row) for row in rows])
    return {"input_ids": input_ids, "position_ids": positions}, first, second


def _same(expected: Tensor, found: Tensor, limit: float, otherwise: str) -> None:
    moved = (expected - found).abs().max().item()
    if not moved <= limit:
        raise ModelError(
            f"in this model {otherwise}: logits moved by {moved:.1e}, and {limit:.1e} is allowed",
            why="documents packed into one block would be trained on each other's text, or on the answer",
            fix="use a model that honours position_ids, or let documents mix: packing.document_mask: false",
        )
