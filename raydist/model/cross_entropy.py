"""Summed cross-entropy in fp32 and its gradient, made together and a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raydist.feed.packing import IGNORED

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits handled at once: 16 MiB in fp32 for a CPU's cache, more on a GPU, for fewer kernels."""


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
        rows = max(1, CHUNK_ELEMENTS.get(logits.device.type, 2**26) // logits.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        # of unscaled values: fp16 would lose the small ones before a loss scale is applied
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        kept = torch.empty_like(logits, dtype=dtype) if needs_gradient else None
        for start in range(0, logits.shape[0], rows):
            chunk = slice(start, start + rows)
            loss, gradient = loss_and_gradient(logits[chunk], labels[chunk], gradient=needs_gradient)
            total += loss
            if kept is not None and gradient is not None:
                kept[chunk] = gradient
        if kept is not None:
            ctx.save_for_backward(kept)
        ctx.dtype = logits.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0]).to(ctx.dtype), None


def loss_and_gradient(
    logits: Tensor, labels: Tensor, *, scale: float = 1.0, cap: float = 0.0, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The summed loss, scalar fp32, and its gradient (N, V) fp32 with respect to logits (N, V).

    scale, cap: the loss is of cap * tanh(logits * scale / cap), or of logits * scale where cap is 0.
    gradient: whether it is wanted. It is softmax - one_hot, in the memory of the log-softmax; zero where
    labels (N) are -100.
    """
    slope: Tensor | None = None
    if scale != 1.0 or cap:
        logits = logits.float() * scale
    if cap:
        bent = torch.tanh(logits / cap)
        logits, slope = bent * cap, 1 - bent.square_()
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="sum")
    if not gradient:
        return loss, None
    made = log_p.exp_()
    target = labels.clamp(min=0).unsqueeze(1)
    made.scatter_add_(1, target, torch.full_like(target, -1, dtype=made.dtype))
    made.mul_((labels != IGNORED).unsqueeze(1))
    if slope is not None:
        made.mul_(slope)
    return loss, made.mul_(scale) if scale != 1.0 else made
