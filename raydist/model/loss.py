"""The loss of a micro batch: summed cross-entropy over the step's global count of labels.

So gradients simply add up, over micro batches and over ranks, and every trained token weighs the
same at any world size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raydist.model.cross_entropy import summed_cross_entropy
from raydist.model.head import BY_TOKEN, LABELS, has_chunked_head, losses_by_token
from raydist.model.precision import DTYPES
from raydist.model.router import ROUTED, router_of

DOCUMENTS = "document_lengths"
Documents = list[list[int]]
"""Of each row, the lengths of its documents from left to right."""
_KNOWN = {"input_ids", "position_ids", "labels", "sample", DOCUMENTS}


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Compute in 16 bits over the weights as they are, or nothing."""
    enabled = mixed_precision != "fp32"
    return torch.autocast(device.type, DTYPES[mixed_precision] if enabled else None, enabled=enabled)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All on `device` but document_lengths, which are read on the host: a GPU is never waited for."""
    return {name: tensor if name == DOCUMENTS else copied(tensor, device) for name, tensor in batch.items()}


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`; on a GPU a copy from pinned memory, which waits for nothing."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, V), of input_ids, position_ids, document_lengths and what a collator added."""
    logits: Tensor = model(**_inputs(batch)).logits
    return logits


def _inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model's forward pass gets.

    Lengths become lists: as a tensor DDP and FSDP2 would move them to their device.
    Without `use_cache=False` transformers silently drops the document mask.
    """
    inputs: dict[str, Any] = {k: tensor for k, tensor in batch.items() if k not in ("labels", "sample")}
    if DOCUMENTS in batch:
        inputs[DOCUMENTS] = [row[row > 0].tolist() for row in batch[DOCUMENTS]]
    return {**inputs, "use_cache": False}


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each label, (B, T) fp32, 0 where it is -100. Without gradient; in the memory of an evaluation."""
    labels, inputs = batch["labels"], _inputs(batch)
    if batch.keys() <= _KNOWN and has_chunked_head(model, labels.numel()):
        losses: Tensor = model(**inputs, **{LABELS: labels, BY_TOKEN: True})
        return losses
    return losses_by_token(model(**inputs).logits, labels)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scalar fp32: the summed loss of a batch, over the labels that are not -100.

    Every strategy and the evaluation call this. In training a router's own loss is added where it is asked
    for (model/router.py). The model computes in what the caller's autocast says, the loss in fp32 all the
    same. Logits of a large vocabulary are never made whole (model/head.py), unless a collator added inputs of
    its own, which may be for the model's own forward pass.
    """
    router, labels = router_of(model) if model.training else None, batch["labels"]
    inputs = _inputs(batch) | (ROUTED if router else {})
    if batch.keys() <= _KNOWN and has_chunked_head(model, labels.numel()):
        loss: Tensor = model(**inputs, **{LABELS: labels})
        return loss
    output = model(**inputs)
    with torch.autocast(labels.device.type, enabled=False):
        loss = summed_cross_entropy(output.logits, labels)
        return loss if router is None else loss + router.term(output.aux_loss, labels)
