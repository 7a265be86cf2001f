"""Steps for one rank: its part of each global batch, as micro batches of tensors, read ahead by a thread.

Global batch s is samples [s*G, (s+1)*G) at any world size; rank r of w takes every w-th of them, from r on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from raydist.corpus.log import Ints
from raydist.feed.packing import IGNORED, Batch
from raydist.feed.stage import Counts, Stage

Tensors = dict[str, torch.Tensor]

PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class Step:
    """Samples [start, stop) of the run. All other fields describe this rank's part of them.

    micro_batches: dicts of tensors, input_ids, labels, position_ids, int64 [B, T], document_lengths, int32
    [B, T], and sample, int64 [B] (see `Blocks.empty`). Every rank has the same number of them, in the same
    shapes, filled up with samples -1, which the counts leave out: their sums over the ranks do not depend on
    the world size. wait_seconds: how long the consumer waited for this step. documents: int64, the lengths of
    this rank's documents, without padding (with attention across documents: of its rows).
    """

    start: int
    stop: int
    micro_batches: list[Tensors]
    n_tokens: int
    n_eos: int
    n_padding: int
    n_labels: int
    n_bos: int
    documents: Ints
    wait_seconds: float = 0.0


def global_batches(
    begins: Sequence[int], start: int, stop: int | None, sizes: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(stage, first sample, end) of the global batches of samples [start, stop).

    begins, sizes: first sample of each stage, and its samples per batch. Batches are counted from the stage's
    first sample; only the first one given may start later than that says, and a stage's last one end earlier.
    """
    ends = [*begins[1:], stop]
    for stage, (begin, end, size) in enumerate(zip(begins, ends, sizes, strict=True)):
        end = stop if end is None or (stop is not None and stop < end) else end
        for batch in itertools.count(max(start - begin, 0) // size):
            lo, hi = max(start, begin + batch * size), begin + (batch + 1) * size
            if end is not None and lo >= end:
                break
            yield stage, lo, hi if end is None else min(hi, end)


def rank_samples(start: int, stop: int, rank: int, world_size: int) -> Ints:
    """A rank's samples of [start, stop), filled up with -1 to as many as rank 0 has."""
    own = np.arange(start + rank, stop, world_size)
    return np.concatenate([own, np.full(-(-(stop - start) // world_size) - len(own), -1)])


def read_step(
    stage: Stage,
    start: int,
    stop: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    collate: Callable[[Tensors], Tensors] | None = None,
    place: Callable[[Tensors], Tensors] | None = None,
) -> Step:
    """One rank's part of a global batch.

    collate: called on each micro batch; labels are counted after it.  place: called last, to copy a micro
    batch to where it is used.
    """
    batch, counts = stage.read(rank_samples(start, stop, rank, world_size))
    step = Step(
        start,
        stop,
        list(micro_batches(batch, micro_batch_size)),
        **Counts(*counts.sum(axis=0).tolist())._asdict(),
        documents=documents_of(batch, counts),
    )
    if collate is not None:
        made = [collate(micro_batch) for micro_batch in step.micro_batches]
        n_labels = sum(int((micro_batch["labels"] != IGNORED).sum()) for micro_batch in made)
        step = replace(step, micro_batches=made, n_labels=n_labels)
    if place is not None:
        step = replace(step, micro_batches=[place(micro_batch) for micro_batch in step.micro_batches])
    return step


def documents_of(batch: Batch, counts: Ints) -> Ints:
    """The lengths of a batch's documents, int64, without padding, which is the end of a row's last one.

    counts: int64 [B, 5], the Counts of each row.
    """
    rows = np.flatnonzero(batch["sample"] >= 0)
    lengths = batch["document_lengths"][rows].astype(np.int64)
    last = np.count_nonzero(lengths, axis=1) - 1
    lengths[np.arange(len(rows)), last] -= counts[rows, Counts._fields.index("n_padding")]
    return lengths[lengths > 0]


def micro_batches(batch: Batch, size: int) -> Iterator[Tensors]:
    """Rows of a batch, `size` at a time."""
    for row in range(0, len(batch["sample"]), size):
        yield {name: torch.from_numpy(array[row : row + size]) for name, array in batch.items()}


def prefetch(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps, read PREFETCHED_STEPS ahead by a thread. An exception of the thread is raised here."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="raydist-feed")
    try:
        pending = deque(pool.submit(next, steps, None) for _ in range(PREFETCHED_STEPS))
        while True:
            began = perf_counter()
            step = pending.popleft().result()
            if step is None:
                return
            pending.append(pool.submit(next, steps, None))
            yield replace(step, wait_seconds=perf_counter() - began)
    finally:
        pool.shutdown(cancel_futures=True)
