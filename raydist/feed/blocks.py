"""A packed block as arrays: inputs, shifted labels and positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raydist.feed.packing import PackIndex

Ints = NDArray[np.int64]
Batch = dict[str, Ints]

IGNORED = -100
"""The label of an input from which nothing is predicted; transformers and torch leave it out of the loss."""


@dataclass(frozen=True)
class Blocks:
    """How pieces of token arrays become rows of a batch. eos: the id added to each document, if any."""

    block_size: int
    document_mask: bool
    eos: int | None
    padding: int

    def empty(self, samples: Ints) -> Batch:
        """A batch of padding, arrays [B, T]; `samples`: number of each row in the run, -1 for none."""
        shape = (len(samples), self.block_size)
        return {
            "input_ids": np.full(shape, self.padding, np.int64),
            "labels": np.full(shape, IGNORED, np.int64),
            "position_ids": np.tile(np.arange(self.block_size), (len(samples), 1)),
            "sample": samples.astype(np.int64),
        }

    def fill(self, batch: Batch, row: int, tokens: NDArray[np.integer], index: PackIndex, block: int) -> None:
        """Write a block into a row of an `empty` batch. `tokens`: all of the shard that `index` is of."""
        pieces = slice(int(index.first[block]), int(index.first[block + 1]))
        offset, length, rest = index.offset[pieces], index.length[pieces], index.rest[pieces]
        stop = np.cumsum(length)
        start, filled = stop - length, int(stop[-1])
        column = _COLUMNS[:filled] if filled <= len(_COLUMNS) else np.arange(filled)
        input_ids, labels = batch["input_ids"][row], batch["labels"][row]
        # An added EOS is in no array: `clip` lets its position be read at the very end, and it is then set.
        input_ids[:filled] = tokens.take(np.repeat(offset - start, length) + column, mode="clip")
        following = tokens.take(offset + length, mode="clip").astype(np.int64)
        if self.eos is not None:
            input_ids[stop[rest == 0] - 1] = self.eos
            following[rest == 1] = self.eos
        following[rest == 0] = IGNORED
        labels[: filled - 1] = input_ids[1:filled]
        labels[stop - 1] = following
        if self.document_mask:
            positions = batch["position_ids"][row]
            positions[:filled] -= np.repeat(start, length)
            positions[filled:] -= filled


_COLUMNS = np.arange(1 << 16)
