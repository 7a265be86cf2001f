"""Attention one document at a time: on CPU that is faster than a mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydist.errors import ModelError
from raydist.model.loss import Documents

PER_DOCUMENT = "raydist_per_document"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


def no_mask(*args: Any, **kwargs: Any) -> None:
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
