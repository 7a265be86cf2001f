"""The order of a stream: windows of consecutive shards, and a seeded permutation of the blocks of each.

The n-th sample of a stream is a pure function of (seed, stream, n). Its values are part of what a
checkpoint means, so they never change: a test pins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints

Words = NDArray[np.uint64]

ROUNDS = 8


def round_keys(seed: int, stream: str, epoch: int, window: int) -> Words:
    """One 64-bit key per Feistel round."""
    name = f"{seed}/{stream}/{epoch}/{window}".encode()
    return np.array([xxhash.xxh3_64_intdigest(name, seed=turn) for turn in range(ROUNDS)], np.uint64)


def permute(index: Ints, n: int, keys: Words) -> Ints:
    """Images of `index`, values in [0, n), under the keyed permutation of [0, n).

    A Feistel network permutes the next power of four; an image outside [0, n) is sent through again,
    which ends because the cycle it is on began inside.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    image = _feistel(index.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(image >= n)).size:
        image[outside] = _feistel(image[outside], half, keys)
    return image.astype(np.int64)


def _feistel(value: Words, half: int, keys: Words) -> Words:
    """A permutation of [0, 4**half): halves of `half` bits each, swapped and mixed in every round."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(word: Words) -> Words:
    """The finalizer of splitmix64 (a fresh array in, changed in place)."""
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word


class Span(NamedTuple):
    """Samples [lo, hi) of one window in one epoch."""

    epoch: int
    window: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Stream:
    """Shards read as one endless sequence of blocks, epoch after epoch.

    blocks: blocks of each shard, int64[S].  window_shards: shards whose blocks are shuffled together.
    """

    key: str
    seed: int
    blocks: Ints
    window_shards: int

    @cached_property
    def shard_ends(self) -> Ints:
        return np.cumsum(self.blocks)

    @cached_property
    def window_ends(self) -> Ints:
        last = np.arange(self.window_shards, len(self.blocks) + self.window_shards, self.window_shards)
        return np.take(self.shard_ends, np.minimum(last, len(self.blocks)) - 1)

    @property
    def n_blocks(self) -> int:
        """Samples in one epoch."""
        return int(self.shard_ends[-1]) if len(self.blocks) else 0

    def window_start(self, window: int) -> int:
        return int(self.window_ends[window - 1]) if window else 0

    def shards_of(self, window: int) -> range:
        first = window * self.window_shards
        return range(first, min(first + self.window_shards, len(self.blocks)))

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Shard of the stream and block of the shard that each sample of the stream is."""
        epochs, within = np.divmod(samples, self.n_blocks)
        windows = np.searchsorted(self.window_ends, within, side="right")
        positions = np.empty_like(samples)
        for epoch, window in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
            here = (epochs == epoch) & (windows == window)
            positions[here] = self.order(epoch, window, within[here] - self.window_start(window))
        return self.split(positions)

    def order(self, epoch: int, window: int, index: Ints) -> Ints:
        """Positions in the stream of the samples at `index` of a window."""
        start = self.window_start(window)
        keys = round_keys(self.seed, self.key, epoch, window)
        return start + permute(index, int(self.window_ends[window]) - start, keys)

    def split(self, positions: Ints) -> tuple[Ints, Ints]:
        shards = np.searchsorted(self.shard_ends, positions, side="right")
        return shards, positions - (self.shard_ends - self.blocks)[shards]

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Samples [start, stop) of the stream, a window of an epoch at a time; empty windows left out."""
        while start < stop:
            epoch, within = divmod(start, self.n_blocks)
            window = int(np.searchsorted(self.window_ends, within, side="right"))
            first = self.window_start(window)
            end = min(int(self.window_ends[window]), within + stop - start)
            yield Span(epoch, window, within - first, end - first)
            start += end - within
