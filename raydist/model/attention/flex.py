"""FlexAttention with a mask of blocks made of the lengths of documents: on GPUs.

Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels". Blocks of
128 queries and keys that see nothing of each other are skipped. Which they are is computed on the host, where
the lengths are known, so the GPU is never waited for; torch's own `create_block_mask` evaluates the mask for
every pair of tokens on the device, for each batch. Its backward pass adds in a fixed order, so a resumed run
ends bit-identical.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from raydist.errors import ModelError, first_line
from raydist.model.attention.function import copied, require_plain
from raydist.model.compiled import allow_recompiling
from raydist.model.loss import Documents

FLEX = "raydist_flex"
BLOCK = 128
BLOCK_MASK = "raydist_block_mask"
TOLERANCE = 5e-2
"""Of the largest value: bf16 in another order of sums. A wrong mask differs by the order of 1."""

Blocks = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Of each row and block of queries: how many blocks of keys, (B, n), and which come first, (B, n, n)."""


def block_mask(documents: Documents, device: torch.device) -> BlockMask:
    """Causal within each document. Rows are of one length T; a shorter last block is padded by the kernel."""
    length = sum(documents[0])
    numbers = np.stack([np.repeat(np.arange(len(row), dtype=np.int32), row) for row in documents])
    some, full = _blocks(numbers)
    of = _tensor(numbers, device)

    def same_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (of[b, q] == of[b, kv]) & (q >= kv)

    some_count, some_first, full_count, full_first = (
        _tensor(each, device).unsqueeze(1) for each in (*some, *full)
    )
    return BlockMask.from_kv_blocks(
        some_count,
        some_first,
        full_count,
        full_first,
        BLOCK_SIZE=BLOCK,
        mask_mod=same_document,
        seq_lengths=(length, length),
    )


def _blocks(numbers: npt.NDArray[np.int32]) -> tuple[Blocks, Blocks]:
    """Blocks in which the mask hides some pairs, and blocks in which it hides no pair.

    numbers (B, T): the document of each token. Documents are in order. So queries of block i see keys of
    block j, j <= i, if the document of the last key is not before that of the first query.
    """
    length = numbers.shape[1]
    n = -(-length // BLOCK)
    firsts = np.arange(n) * BLOCK
    lasts = np.minimum(firsts + BLOCK, length) - 1
    first, last = numbers[:, firsts], numbers[:, lasts]  # (B, n)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = (j <= i) & (last[:, None, :] >= first[:, :, None])
    whole = (lasts - firsts + 1 == BLOCK)[:, None]
    full = (j < i) & whole & (first[:, None, :] == last[:, :, None])
    return _listed(seen & ~full), _listed(full)


def _listed(chosen: npt.NDArray[np.bool_]) -> Blocks:
    order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    return chosen.sum(-1, dtype=np.int32), order


def _tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return copied(torch.from_numpy(np.ascontiguousarray(array)), device)  # kernels take no other layout


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    raydist_block_mask: BlockMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D)."""
    mask = require_plain(module, {**kwargs, "dropout": dropout or None}, handed_over=raydist_block_mask)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which knows SDPA, but not this
        query, key, value = (each.to(torch.get_autocast_dtype(kind)) for each in (query, key, value))
    with torch.autocast(kind, enabled=False):  # or it would be compiled once more
        out = _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).contiguous(), None


def check_flex(config: Any, device: torch.device) -> None:
    """Raises ModelError where this attention does not run on `device`, or is not what SDPA computes.

    Forward and backward, of a few blocks with the heads of this model, in bf16.
    """
    documents = [[200, 1, 99], [300]]
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(2, h, 300, width, device=device, dtype=torch.bfloat16, generator=generator)
            for h in (heads, kv_heads, kv_heads)
        )
        inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
        mask = block_mask(documents, device)
        grouped = heads != kv_heads
        ours = _compiled_alone()(query, key, value, block_mask=mask, enable_gqa=grouped)
        dense = _dense(documents, device)
        reference = F.scaled_dot_product_attention(query, key, value, dense, enable_gqa=grouped)
        upstream = torch.randn(ours.shape, device=device, dtype=ours.dtype, generator=generator)
        pairs = zip(
            [ours, *torch.autograd.grad(ours, inputs, upstream)],
            [reference, *torch.autograd.grad(reference, inputs, upstream)],
            strict=True,
        )
        worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    except Exception as error:  # a compiler fails in many ways; each only means that another kind is taken
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"FlexAttention does not run on this device: {why}") from error
    if not worst < TOLERANCE:
        raise ModelError(f"FlexAttention differs from SDPA by {worst:.1e}, and {TOLERANCE:.1e} is allowed")


def _dense(documents: Documents, device: torch.device) -> Tensor:
    """(B, 1, T, T), true where a query sees a key."""
    numbers = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in documents])
    causal = torch.ones(numbers.shape[1], numbers.shape[1], dtype=torch.bool).tril()
    return ((numbers[:, :, None] == numbers[:, None, :]) & causal).unsqueeze(1).to(device)


def _compiled() -> Any:
    """Within a compiled layer the plain function, which its compiler takes in; else a compiled one."""
    return flex_attention if torch.compiler.is_compiling() else _compiled_alone()


@functools.cache
def _compiled_alone() -> Callable[..., Tensor]:
    """Compiled for each shape by itself. Uncompiled it would hold whole score matrices."""
    allow_recompiling()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


@functools.cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """A cap on scores, as in Gemma 2."""

    def bend(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return bend
