"""Documents in the masks that transformers makes.

Most models hand position_ids to transformers' mask, which finds the documents in them. Some do not, such as
gpt-oss, Falcon, BLOOM and MPT. They make their masks by the same functions, which get the documents here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    packed_sequence_mask_function,
)

from raydist.model.loss import Documents, copied

MASKED = ("sdpa", "eager")
"""Kinds of attention that take a mask of each pair of tokens."""

_numbers: ContextVar[Tensor | None] = ContextVar("_numbers", default=None)
"""The number of each token's document, (B, T), in a forward pass; None: masks are left as they are."""


def mask_documents() -> None:
    """From now on transformers' masks of MASKED are those within the documents of `set_documents`, if any."""
    for name in MASKED:
        make = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(make, _OURS):
            AttentionMaskInterface.register(name, _within_documents(make))


_OURS = "_raydist_within_documents"


def _within_documents(make: Callable[..., Any]) -> Callable[..., Any]:
    def masked(*args: Any, **given: Any) -> Any:
        if (numbers := _numbers.get()) is not None:
            same = packed_sequence_mask_function(numbers)
            given |= {"mask_function": and_masks(given["mask_function"], same), "allow_is_causal_skip": False}
        return make(*args, **given)

    setattr(masked, _OURS, True)
    return masked


def set_documents(documents: Documents, device: torch.device) -> None:
    """For the forward pass that follows. Numbers are made on the host, so a GPU is not waited for."""
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents]
    _numbers.set(copied(torch.stack(rows), device))


def forget_documents(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook."""
    _numbers.set(None)
