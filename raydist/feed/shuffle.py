"""The order of a stream: windows of consecutive shards, and a seeded permutation of the blocks of each.

The n-th sample of a stream is a pure function of (seed, stream, n). Its values are part of what a
checkpoint means, so they never change: a test pins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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


HEAD = -1
"""In place of a window's number: what a stream begins with, see `Stream.head`."""


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
    head: blocks of each shard of what is left of a window, which is read first, int64[H]; these shards
    are numbered on from S.  begins: the epoch and window that follow the head.
    """

    key: str
    seed: int
    blocks: Ints
    window_shards: int
    head: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    begins: tuple[int, int] = (0, 0)

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

    @cached_property
    def n_head(self) -> int:
        return int(self.head.sum())

    @property
    def _skipped(self) -> int:
        """Samples of the endless sequence before the one that follows the head."""
        epoch, window = self.begins
        return epoch * self.n_blocks + self.window_start(window)

    def window_start(self, window: int) -> int:
        return int(self.window_ends[window - 1]) if window else 0

    def size(self, window: int) -> int:
        """Samples of a window, or of the HEAD."""
        return self.n_head if window == HEAD else int(self.window_ends[window]) - self.window_start(window)

    def shards_of(self, window: int) -> range:
        if window == HEAD:
            return range(len(self.blocks), len(self.blocks) + len(self.head))
        first = window * self.window_shards
        return range(first, min(first + self.window_shards, len(self.blocks)))

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """Shard of the stream and block of the shard that each sample of the stream is."""
        epochs, within = np.divmod(samples - self.n_head + self._skipped, self.n_blocks)
        windows = np.searchsorted(self.window_ends, within, side="right")
        windows[samples < self.n_head] = epochs[samples < self.n_head] = HEAD
        shards, blocks = np.empty_like(samples), np.empty_like(samples)
        for epoch, window in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
            here = np.flatnonzero((epochs == epoch) & (windows == window))
            index = samples[here] if window == HEAD else within[here] - self.window_start(window)
            shards[here], blocks[here] = self.order(epoch, window, index)
        return shards, blocks

    def order(self, epoch: int, window: int, index: Ints) -> tuple[Ints, Ints]:
        """Shards of the stream, and blocks in them, of the samples at `index` of a window."""
        keys = round_keys(self.seed, self.key, epoch, window)
        image = permute(index, self.size(window), keys)
        shards = self.shards_of(window)
        sizes = self.head if window == HEAD else self.blocks[shards.start : shards.stop]
        ends = np.cumsum(sizes)
        nth = np.searchsorted(ends, image, side="right")
        return nth + shards.start, image - (ends - sizes)[nth]

    def places(self, span: Span) -> tuple[Ints, Ints]:
        """Shards and blocks of a span's samples."""
        return self.order(span.epoch, span.window, np.arange(span.lo, span.hi))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Samples [start, stop) of the stream, a window of an epoch at a time; empty windows left out."""
        if start < min(stop, self.n_head):
            yield Span(HEAD, HEAD, start, min(stop, self.n_head))
        at, end = (max(g - self.n_head, 0) + self._skipped for g in (start, stop))
        while at < end:
            span = self._span(at)
            taken = min(span.hi - span.lo, end - at)
            yield span._replace(hi=span.lo + taken)
            at += taken

    def _span(self, at: int) -> Span:
        """From a sample of the endless sequence to the end of its window."""
        epoch, within = divmod(at, self.n_blocks)
        window = int(np.searchsorted(self.window_ends, within, side="right"))
        return Span(epoch, window, within - self.window_start(window), self.size(window))

    def left(self, n: int) -> tuple[Span, tuple[int, int]]:
        """After n samples: those of the open window not yet read, and the epoch and window after it."""
        if n < self.n_head:
            return Span(HEAD, HEAD, n, self.n_head), self.begins
        span = self._span(n - self.n_head + self._skipped)
        if span.lo == 0:
            return span._replace(hi=0), (span.epoch, span.window)
        last = span.window + 1 == len(self.window_ends)
        return span, (span.epoch + 1, 0) if last else (span.epoch, span.window + 1)
