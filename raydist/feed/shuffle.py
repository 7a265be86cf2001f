"""The order of a stream: windows of consecutive shards, and a seeded permutation of the blocks of each.

The n-th sample of a stream is a pure function of (seed, stream, n). A checkpoint relies on its values, so
they never change: a test pins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints

Words = NDArray[np.uint64]
_Position = TypeVar("_Position", int, Ints)

ROUNDS = 8


def round_keys(seed: int, stream: str, epoch: int, window: int) -> Words:
    """One 64-bit key per Feistel round."""
    name = f"{seed}/{stream}/{epoch}/{window}".encode()
    return np.array([xxhash.xxh3_64_intdigest(name, seed=turn) for turn in range(ROUNDS)], np.uint64)


def permute(index: Ints, n: int, keys: Words) -> Ints:
    """Images of `index`, values in [0, n), under the keyed permutation of [0, n).

    A Feistel network permutes [0, the next power of four). An image outside [0, n) is sent through it again.
    That ends, because the image lies on a cycle that also holds `index`, which is inside.
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
    """The finalizer of splitmix64. Changes `word` in place."""
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word


HEAD = -1
"""In place of a window's number: the blocks that the stage before left unread, see `Stream.head`."""


class Span(NamedTuple):
    """Samples [lo, hi) of one window in one epoch."""

    epoch: int
    window: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Stream:
    """Shards read as one endless sequence of blocks, epoch after epoch. A position counts samples from 0.

    blocks: blocks of each shard, int64 [S].  window_shards: shards whose blocks are shuffled together.
    head: blocks of each shard whose rest, left unread by the stage before, is read first, int64 [H]; these
    shards are numbered from S on.  begins: the epoch and window that follow the head.
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

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """The stream's shard, and the block in it, of the sample at each position."""
        epochs, offsets = np.divmod(self._behind_head(positions), self.n_blocks)
        windows = np.searchsorted(self.window_ends, offsets, side="right")
        in_head = positions < self.n_head
        windows[in_head] = epochs[in_head] = HEAD
        shards, blocks = np.empty_like(positions), np.empty_like(positions)
        for epoch, window in set(zip(epochs.tolist(), windows.tolist(), strict=True)):
            rows = np.flatnonzero((epochs == epoch) & (windows == window))
            index = positions[rows] if window == HEAD else offsets[rows] - self.window_start(window)
            shards[rows], blocks[rows] = self.order(epoch, window, index)
        return shards, blocks

    def order(self, epoch: int, window: int, index: Ints) -> tuple[Ints, Ints]:
        """The stream's shard, and the block in it, of a window's samples; `index` counts in the window."""
        keys = round_keys(self.seed, self.key, epoch, window)
        image = permute(index, self.size(window), keys)
        shards = self.shards_of(window)
        sizes = self.head if window == HEAD else self.blocks[shards.start : shards.stop]
        ends = np.cumsum(sizes)
        number = np.searchsorted(ends, image, side="right")
        return number + shards.start, image - (ends - sizes)[number]

    def places(self, span: Span) -> tuple[Ints, Ints]:
        """Shards and blocks of a span's samples."""
        return self.order(span.epoch, span.window, np.arange(span.lo, span.hi))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Positions [start, stop), a window of an epoch at a time; empty windows are left out."""
        if start < min(stop, self.n_head):
            yield Span(HEAD, HEAD, start, min(stop, self.n_head))
        offset, end = (self._behind_head(max(position, self.n_head)) for position in (start, stop))
        while offset < end:
            span = self._rest_of_window(offset)
            n_samples = min(span.hi - span.lo, end - offset)
            yield span._replace(hi=span.lo + n_samples)
            offset += n_samples

    def left(self, n_samples: int) -> tuple[Span, tuple[int, int]]:
        """After n_samples: those of the open window not yet read, and the epoch and window that follow it."""
        if n_samples < self.n_head:
            return Span(HEAD, HEAD, n_samples, self.n_head), self.begins
        span = self._rest_of_window(self._behind_head(n_samples))
        if span.lo == 0:
            return span._replace(hi=0), (span.epoch, span.window)
        last = span.window + 1 == len(self.window_ends)
        return span, (span.epoch + 1, 0) if last else (span.epoch, span.window + 1)

    def _behind_head(self, position: _Position) -> _Position:
        """A position behind the head, counted from the start of epoch 0 as if there were no head."""
        epoch, window = self.begins
        return position - self.n_head + epoch * self.n_blocks + self.window_start(window)

    def _rest_of_window(self, offset: int) -> Span:
        """From an offset, as `_behind_head` gives it, to the end of its window."""
        epoch, within = divmod(offset, self.n_blocks)
        window = int(np.searchsorted(self.window_ends, within, side="right"))
        return Span(epoch, window, within - self.window_start(window), self.size(window))
