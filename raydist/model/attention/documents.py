"""Hands the lengths of documents to the attention of a model."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from raydist.errors import ModelError
from raydist.model.attention.flex import BLOCK_MASKS, FLEX, block_masks
from raydist.model.attention.layers import windows_of
from raydist.model.attention.masks import forget_documents, mask_documents, set_documents
from raydist.model.attention.per_document import PER_DOCUMENT
from raydist.model.loss import DOCUMENTS, Documents, copied

FLASH = "flash_attention_2"


def give_documents(model: nn.Module, attention: str, *, masked: bool = False) -> None:
    """From now on forward passes of `model` hand the documents to `attention`, as that one takes them.

    masked: put them into the masks of SDPA and eager attention, whether or not the model hands on its
    positions.
    """
    for earlier in model.__dict__.get(_HOOKS, ()):
        earlier.remove()
    hook = partial(_hand_over, attention, masked)
    model.__dict__[_HOOKS] = [model.register_forward_pre_hook(hook, with_kwargs=True)]
    if masked:
        mask_documents()
        model.__dict__[_HOOKS] += [model.register_forward_hook(forget_documents, always_call=True)]


_HOOKS = "_raydist_documents"


def _hand_over(
    attention: str, masked: bool, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: in place of document_lengths what `attention` needs; nothing, if that is a mask."""
    documents: Documents | None = inputs.get(DOCUMENTS)
    inputs = {name: value for name, value in inputs.items() if name != DOCUMENTS}
    if masked and documents is not None:
        set_documents(documents, inputs["input_ids"].device)
    if attention not in (PER_DOCUMENT, FLASH, FLEX):
        return args, inputs
    if documents is None:
        raise ModelError(
            f"{attention} got a batch without {DOCUMENTS}",
            why="it cannot tell the documents of a block apart",
            fix="take batches from the feed as they are, and call the model through raydist.model.loss",
        )
    if attention == FLASH:
        return args, inputs | flash_arguments(documents, inputs["input_ids"].device)
    if attention == FLEX:
        windows = set(windows_of(model.config))  # type: ignore[arg-type]
        return args, inputs | {BLOCK_MASKS: block_masks(documents, inputs["input_ids"].device, windows)}
    return args, {**inputs, DOCUMENTS: documents}


def flash_arguments(documents: Documents, device: torch.device) -> dict[str, Any]:
    """Where each document begins and ends, all rows one after another, as flash attention's kernel takes it.

    cu_seq_lens: int32, (documents + 1,). max_length: T, an upper bound of every batch alike. The zeros behind
    a row's documents are left out: the kernel takes sequences of no length, but starts thread blocks for each
    (65,535 at most, which B times T exceeds) and keeps 128 rows of gradient for each. That is why lengths are
    kept on the host.
    """
    edges = copied(torch.tensor([0, *accumulate(chain.from_iterable(documents))], dtype=torch.int32), device)
    longest = sum(documents[0])
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }
