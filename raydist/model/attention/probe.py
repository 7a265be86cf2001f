"""The proof that tokens of a packed block see what they may and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raydist.errors import ModelError, first_line
from raydist.model.loss import DOCUMENTS, autocast, logits_of, to_device

_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest logit. A dropped mask moves them by tens of percent."""


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
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise not_runnable(model, error) from error
    finally:
        model.train(was_training)
    if not logits.isfinite().all():
        computed = "bf16" if bf16 else str(next(model.parameters()).dtype).removeprefix("torch.")
        raise ModelError(
            f"{type(model).__name__} gives logits that are no finite numbers",
            where="model",
            why=f"a block of {first + second} random tokens was tried, in {computed}",
            fix="compare the base with its source; one that overflows in 16 bits is needed in bf16 or fp32",
        )
    base, other_second, other_first, other_last, swapped = logits
    computed_in = torch.bfloat16 if bf16 else next(model.parameters()).dtype
    limit = _PROBE_TOLERANCE[computed_in] * logits.abs().max().item()
    _same(base[: first - 1], other_last[: first - 1], limit, "a token sees the tokens after it")
    if document_mask:
        _same(base[:first], other_second[:first], limit, "a document sees the one after it")
        _same(base[first:], other_first[first:], limit, "a document sees the one before it")
        _same(base[first:], swapped[:second], limit, "a document depends on where in the block it stands")


def not_runnable(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not take packed blocks",
        why=first_line(error),
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
