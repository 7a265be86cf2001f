"""FlexAttention with a mask of blocks made of the lengths of documents: on GPUs.

Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels". Blocks of
128 queries and keys that see nothing of each other are skipped. Which they are is computed on the host, where
the lengths are known, so the GPU is never waited for; torch's own `create_block_mask` evaluates the mask for
every pair of tokens on the device, for each batch. Its backward pass adds in a fixed order, so a resumed run
ends bit-identical.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from raydist.errors import ModelError, first_line
from raydist.model.attention.function import require_plain
from raydist.model.attention.layers import Asked, Window
from raydist.model.compiled import allow_recompiling
from raydist.model.layers import heads_of, layer_configs
from raydist.model.loss import Documents, copied

FLEX = "raydist_flex"
BLOCK = 128
BLOCK_MASKS = "raydist_block_masks"
TOLERANCE = 5e-2
"""Of the largest value: bf16 in another order of sums. A wrong mask differs by the order of 1."""

Blocks = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Of each row and block of queries: how many blocks of keys, (B, n), and which come first, (B, n, n)."""

Masks = dict[Window, BlockMask]


def block_masks(documents: Documents, device: torch.device, windows: Iterable[Window] = ()) -> Masks:
    """A mask for each window, and for none. A window that is not shorter than a row is none."""
    whole, length = block_mask(documents, device), sum(documents[0])
    made: Masks = {None: whole}
    for window in windows:
        shorter = window is not None and window < length
        made[window] = block_mask(documents, device, window) if shorter else whole
    return made


def block_mask(documents: Documents, device: torch.device, window: Window = None) -> BlockMask:
    """Causal within each document. Rows are of one length T; a shorter last block is padded by the kernel."""
    length = sum(documents[0])
    numbers = np.stack([np.repeat(np.arange(len(row), dtype=np.int32), row) for row in documents])
    some, full = _blocks(numbers, window)
    of = _tensor(numbers, device)

    def same_document(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = (of[b, q] == of[b, kv]) & (q >= kv)
        return seen if window is None else seen & (q - kv < window)

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


def _blocks(numbers: npt.NDArray[np.int32], window: Window) -> tuple[Blocks, Blocks]:
    """Blocks in which the mask hides some pairs, and blocks in which it hides no pair.

    numbers (B, T): the document of each token. Documents are in order. So queries of block i see keys of
    block j, j <= i, if the document of the last key is not before that of the first query, and if the nearest
    two of them are within the window. Of a block that is seen whole, the farthest two are.
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
    if window is not None:
        seen &= firsts[:, None] - lasts[None, :] < window
        full &= lasts[:, None] - firsts[None, :] < window
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
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    raydist_block_masks: Masks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D).

    s_aux: (H,), the score of a sink, to which a query gives a part of its attention (gpt-oss).
    """
    masks = require_plain(module, {**kwargs, "dropout": dropout or None}, handed_over=raydist_block_masks)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which knows SDPA, but not this
        query, key, value = (each.to(torch.get_autocast_dtype(kind)) for each in (query, key, value))
    with torch.autocast(kind, enabled=False):  # or it would be compiled once more
        out = attend(query, key, value, masks[sliding_window], scale=scaling, cap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query (B, H, T, D), key and value (B, H_kv, T, D), sinks (H,) -> (B, H, T, D)."""
    options: dict[str, Any] = {
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    options["score_mod"] = None if cap is None else _capped(cap)
    if sinks is None:
        out: Tensor = _compiled()(query, key, value, **options)
        return out
    out, more = _compiled()(query, key, value, **options, return_aux=AuxRequest(lse=True))
    return out * torch.sigmoid(more.lse - sinks.float().view(1, -1, 1)).unsqueeze(-1).to(out.dtype)


def check_flex(config: Any, device: torch.device, asked: Asked) -> None:
    """Raises ModelError where this attention does not run on `device`, or is not what softmax computes.

    Forward and backward, of a few blocks with the heads of this model, in bf16, for what its layers ask.
    """
    try:
        sizes = dict.fromkeys(heads_of(layer)[:3] for layer in layer_configs(config))
        worst = max(_difference(*each, device, asked) for each in sizes)
    except Exception as error:  # a compiler fails in many ways; each only means that another kind is taken
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"FlexAttention does not run on this device: {why}") from error
    if not worst < TOLERANCE:
        raise ModelError(f"FlexAttention differs from softmax by {worst:.1e}, and {TOLERANCE:.1e} is allowed")


def _difference(heads: int, kv_heads: int, width: int, device: torch.device, asked: Asked) -> float:
    """Of what is computed and of its gradients, relative to the largest value."""
    documents = [[200, 1, 99], [300]]
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(2, h, 300, width, device=device, dtype=torch.bfloat16, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    )
    sinks = torch.randn(heads, device=device, dtype=torch.bfloat16, generator=generator)
    inputs = [each.requires_grad_() for each in [query, key, value, *([sinks] if asked.sinks else [])]]
    upstream = torch.randn(query.shape, device=device, dtype=query.dtype, generator=generator)
    worst = 0.0
    given = sinks if asked.sinks else None
    for window in {None, *(window and min(window, 100) for window in asked.windows)}:
        mask, seen = block_mask(documents, device, window), _dense(documents, device, window)
        ours = attend(query, key, value, mask, sinks=given)
        reference = plain_attention(query, key, value, seen, given)
        pairs = zip(
            [ours, *torch.autograd.grad(ours, inputs, upstream)],
            [reference, *torch.autograd.grad(reference, inputs, upstream)],
            strict=True,
        )
        worst = max(worst, *(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    return worst


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """What `attend` computes, by its definition. seen (B, 1, T, T)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1).float() for each in (key, value))
    scores = (query.float() @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).to(query.dtype)


def _dense(documents: Documents, device: torch.device, window: Window = None) -> Tensor:
    """(B, 1, T, T), true where a query sees a key."""
    numbers = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in documents])
    causal = torch.ones(numbers.shape[1], numbers.shape[1], dtype=torch.bool).tril()
    seen = causal if window is None else causal.triu(1 - window)
    return ((numbers[:, :, None] == numbers[:, None, :]) & seen).unsqueeze(1).to(device)


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
