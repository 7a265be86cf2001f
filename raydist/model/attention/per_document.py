"""Attention one document at a time: on CPU that is faster than a mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydist.model.attention.function import require_plain
from raydist.model.loss import Documents

PER_DOCUMENT = "raydist_per_document"


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
    documents = require_plain(module, kwargs, handed_over=document_lengths)
    options: dict[str, Any] = {"is_causal": True, "scale": scaling, "dropout_p": dropout}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if all(len(lengths) == 1 for lengths in documents):
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).contiguous(), None
    out = [
        _attend_row(q, k, v, lengths, options)
        for q, k, v, lengths in zip(query, key, value, documents, strict=True)
    ]
    return torch.stack(out), None


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], options: dict[str, Any]
) -> Tensor:
    """One block: (H, T, D) -> (T, H, D). `split`, not slices: its backward is one concatenation."""
    parts = [tensor.unsqueeze(0).split(lengths, dim=2) for tensor in (query, key, value)]
    out = [F.scaled_dot_product_attention(*document, **options) for document in zip(*parts, strict=True)]
    return torch.cat(out, dim=2)[0].transpose(0, 1)
