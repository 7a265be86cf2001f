"""Loss, perplexity and bits per byte of each source's held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raydist.model.loss import autocast, loss_of, to_device
from raydist.parallel.world import World


class EvalData(Protocol):
    """Held-out documents of one source, packed; `batches` gives equally many on every rank.

    n_labels: in the batches of all ranks together.
    """

    name: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    n_labels: int

    def batches(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Evaluation:
    """eval_loss: nats per label.  bits_per_byte: of the UTF-8 text, comparable across tokenizers."""

    source: str
    eval_loss: float
    perplexity: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    n_documents: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sets: Sequence[EvalData],
    world: World,
    micro_batch_size: int,
    mixed_precision: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Evaluation]:
    """Evaluate every set that has documents, in fp64 sums over all ranks. Leaves `model` in training mode.

    on_progress: called with the labels that are done, of all, as this rank sees it.
    """
    sets = [each for each in sets if each.n_documents]
    done, total = 0, sum(each.n_labels for each in sets)

    def count(labels: int) -> None:
        nonlocal done
        done = min(total, done + labels * world.world_size)
        on_progress(done, total)

    model.eval()
    try:
        return [_evaluate_one(model, each, world, micro_batch_size, mixed_precision, count) for each in sets]
    finally:
        model.train()


def _evaluate_one(
    model: nn.Module,
    data: EvalData,
    world: World,
    micro_batch_size: int,
    mixed_precision: str,
    count: Callable[[int], None],
) -> Evaluation:
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in data.batches(world.rank, world.world_size, micro_batch_size):
        labels = int((batch["labels"] >= 0).sum())
        batch = to_device(batch, world.device)
        with autocast(world.device, mixed_precision):
            loss += loss_of(model, batch)
        count(labels)
    total = world.sum_floats([loss.item()])[0]
    mean = total / max(data.n_labels, 1)
    return Evaluation(
        source=data.name,
        eval_loss=mean,
        perplexity=math.exp(min(mean, 700)),
        bits_per_byte=total / math.log(2) / max(data.n_bytes, 1),
        n_tokens=data.n_tokens,
        n_bytes=data.n_bytes,
        n_documents=data.n_documents,
    )
