"""The loss of a micro batch: summed cross-entropy over the step's global count of labels.

So gradients simply add up, over micro batches and over ranks, and every trained token weighs the
same at any world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydist.feed.packing import IGNORED

DOCUMENTS = "document_lengths"
Documents = list[list[int]]
"""Of each row, the lengths of its documents from left to right."""
CHUNK_ELEMENTS = 2**22
"""Logits handled at once: 16 MiB in fp32, whatever the vocabulary."""


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """bf16 compute over the weights as they are, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All on `device` but document_lengths, which are read on the host: a GPU is never waited for."""
    return {name: tensor if name == DOCUMENTS else tensor.to(device) for name, tensor in batch.items()}


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, V), of input_ids, position_ids, document_lengths and what a collator added.

    Lengths become lists: as a tensor DDP and FSDP2 would move them to their device.
    Without `use_cache=False` transformers silently drops the document mask.
    """
    inputs: dict[str, Any] = {k: tensor for k, tensor in batch.items() if k not in ("labels", "sample")}
    if DOCUMENTS in batch:
        inputs[DOCUMENTS] = [row[row > 0].tolist() for row in batch[DOCUMENTS]]
    output = model(**inputs, use_cache=False)
    logits: Tensor = output.logits
    return logits


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scalar fp32: the summed loss of a batch, over the labels that are not -100.

    Every strategy and the evaluation call this, so a loss term of the model's own, as of a router, belongs
    here. The model computes in what the caller's autocast says, the loss in fp32 all the same.
    """
    logits = logits_of(model, batch)
    with torch.autocast(logits.device.type, enabled=False):
        return summed_cross_entropy(logits, batch["labels"])


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Scalar fp32: over the labels that are not -100. logits (B, T, V), labels (B, T), already shifted."""
    loss: Tensor = _ChunkedCrossEntropy.apply(logits.flatten(0, 1), labels.flatten())  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes the gradient along with the loss, a chunk of rows at a time.

    The stock function keeps an fp32 copy of all logits and another of their log-softmax, which with
    a large vocabulary is most of a worker's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if needs_gradient else None
        for start in range(0, logits.shape[0], rows):
            chunk = slice(start, start + rows)
            log_p = F.log_softmax(logits[chunk], dim=-1, dtype=torch.float32)
            total += F.nll_loss(log_p, labels[chunk], ignore_index=IGNORED, reduction="sum")
            if gradient is not None:
                gradient[chunk] = _gradient_(log_p, labels[chunk])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0]), None


def _gradient_(log_p: Tensor, labels: Tensor) -> Tensor:
    """softmax - one_hot, in the memory of log_p; zero where there is no label."""
    trained = labels != IGNORED
    target = labels.clamp(min=0).unsqueeze(1)
    gradient = log_p.exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    return gradient.mul_(trained.unsqueeze(1))
