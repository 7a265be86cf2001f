"""Which documents of a bad batch are to blame: the loss of each by itself, under the weights that saw it.

    batch ─▶ forward pass without gradient ─▶ losses of all its tokens, on rank 0 ─▶ documents that stand out

A batch's loss is a mean over thousands of tokens, so one bad document among good ones hardly shows in it. Its
own loss does. A document with fewer labels varies more: as the square root, if tokens are independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raydist.feed.trace import pieces
from raydist.model.loss import autocast, token_losses
from raydist.training.guard import Typical

if TYPE_CHECKING:
    from raydist.feed.feed import Feed
    from raydist.feed.loader import Step
    from raydist.training.loop import Attempt

THRESHOLD = 3.5
"""Deviations above the median from which a document stands out, as Iglewicz and Hoaglin advise.

Those among them are left out whose loss is nearer to the median than to that of the worst.
"""
MOST_NAMED = 50
UNLABELLED = -1.0


@dataclass(frozen=True)
class Suspects:
    """documents: {source, file, row, loss, score}, worst first, at most MOST_NAMED.  more: others like them.

    stand_out: whether they do; if not, no document does, and these are those of the whole batch, in order.
    """

    documents: list[dict[str, Any]]
    more: int
    stand_out: bool


@torch.no_grad()
def losses_of(attempt: Attempt, batch: Step) -> Tensor:
    """Of each label of the global batch, (B, T) fp32 on the CPU; UNLABELLED elsewhere. Collective."""
    world, model = attempt.world, attempt.strategy.model
    size = batch.micro_batches[0]["labels"].shape[1]
    found = torch.zeros(batch.stop - batch.start, size)
    model.eval()
    try:
        for micro_batch in batch.micro_batches:
            with autocast(world.device, attempt.job.train.mixed_precision):
                losses = token_losses(model, micro_batch)
            losses = losses.masked_fill(micro_batch["labels"] < 0, UNLABELLED).cpu()
            own = micro_batch["sample"].cpu()
            found[own[own >= 0] - batch.start] = losses[own >= 0]
    finally:
        model.train()
    return world.sum_(found)


def find_suspects(feed: Feed, start: int, losses: Tensor, typical: Typical | None) -> Suspects:
    """Of the samples from `start` on. losses: as from `losses_of`.  typical: the losses of good steps."""
    total = max(int((losses != UNLABELLED).sum()), 1)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for each in _documents(feed, start, losses):
        loss, share = each["loss"], each.pop("labels") / total
        score = typical.score(loss, share) if typical else -math.inf if math.isfinite(loss) else math.inf
        known = found.setdefault((each["source"], each["file"], each["row"]), each | {"score": score})
        if score > known["score"]:
            known.update(loss=loss, score=score)
    bad = sorted((e for e in found.values() if e["score"] > THRESHOLD), key=lambda e: -e["score"])
    if bad:
        least = (bad[0]["loss"] + (typical.median if typical else 0.0)) / 2
        bad = [each for each in bad if each["loss"] >= least or not math.isfinite(each["loss"])]
    named = bad or list(found.values())
    return Suspects(named[:MOST_NAMED], max(len(named) - MOST_NAMED, 0), stand_out=bool(bad))


def _documents(feed: Feed, start: int, losses: Tensor) -> Iterator[dict[str, Any]]:
    """Those with labels, with their mean loss. A document that was cut occurs once for each of its parts."""
    for index, row in enumerate(losses):
        for piece in pieces(feed, start + index):
            own = row[piece.first : piece.first + piece.length]
            own = own[own != UNLABELLED]
            if len(own):
                place = {"source": piece.source, "file": piece.file, "row": piece.row}
                yield {**place, "loss": float(own.double().mean()), "labels": len(own)}
