"""Documents into blocks of block_size inputs: an index of a shard's blocks, made from document lengths, and
from it a block as arrays: inputs, shifted labels, positions and lengths of documents.

concat     documents one after another, cut every block_size inputs.
best_fit   a document longer than a block first fills whole blocks. The rests, longest first, each go to the
           fullest block that still holds them, so a document is cut only if it is longer than a block.

With both, every input of every kept document is in exactly one block; only padding is added.

Tokens that are not in the token log may stand around a document: a BOS in front of its first token and an
EOS behind its last one. They are inputs of the document like the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from raydist.corpus.log import Ints

Batch = dict[str, NDArray[np.integer]]


class Block(TypedDict):
    """One sample: a row of a batch, arrays [T], and its number in the run. See `Blocks.empty`."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    document_lengths: NDArray[np.int32]
    sample: int


REVISION = 1
"""Increased when the same lengths would be packed otherwise, so that older indexes are not used."""
IGNORED = -100
"""The label of an input from which nothing is predicted; transformers and torch leave it out of the loss."""


class Fragments(NamedTuple):
    """Runs of inputs, each of one document of a shard; int64 [F] each.

    document: its row in the shard.  offset: of the first input, in the shard's tokens; that of an added BOS
    is one less than its document's first token's.  length: inputs, added BOS and EOS among them.  rest:
    inputs of the document that follow the run.  bos: 1 where the run begins with an added BOS, else 0.
    """

    document: Ints
    offset: Ints
    length: Ints
    rest: Ints
    bos: Ints


@dataclass(frozen=True)
class PackIndex:
    """Blocks of one shard. Block b holds pieces [first[b], first[b+1]), from left to right.

    first: int64 [B+1].  counts: int64 [B, 4], document tokens, EOS, padding and labels of each block; what
    they leave of its inputs are BOS. The other columns describe pieces, int64 [P], as in `Fragments`.
    """

    first: Ints
    counts: Ints
    document: Ints
    offset: Ints
    length: Ints
    rest: Ints
    bos: Ints

    @property
    def n_blocks(self) -> int:
        return len(self.first) - 1

    def fragments(self, blocks: Ints) -> Fragments:
        """The pieces of these blocks. Pieces that follow each other in their document are joined."""
        chosen = np.zeros(self.n_blocks, bool)
        chosen[blocks] = True
        pieces = np.flatnonzero(np.repeat(chosen, np.diff(self.first)))
        pieces = pieces[np.lexsort((self.offset[pieces], self.document[pieces]))]
        document, offset, length = self.document[pieces], self.offset[pieces], self.length[pieces]
        apart = (np.diff(document) != 0) | (offset[1:] != (offset + length)[:-1])
        first = np.flatnonzero(np.concatenate([[True], apart])[: len(pieces)])
        last = np.append(first[1:], len(pieces)) - 1 if len(first) else first
        joined = np.add.reduceat(length, first) if len(first) else length
        return Fragments(
            document[first], offset[first], joined, self.rest[pieces][last], self.bos[pieces][first]
        )

    def flat(self) -> Ints:
        """All arrays as one, for storage. Without any BOS its column is left out, as in older indexes."""
        bos = (self.bos,) if self.bos.any() else ()
        pieces = (self.document, self.offset, self.length, self.rest, *bos)
        return np.concatenate([[self.n_blocks, len(self.document)], self.first, self.counts.ravel(), *pieces])

    @classmethod
    def from_flat(cls, flat: Ints) -> PackIndex:
        blocks, pieces = int(flat[0]), int(flat[1])
        ends = np.cumsum([blocks + 1, 4 * blocks, pieces, pieces, pieces, pieces])
        first, counts, document, offset, length, rest, bos = np.split(flat[2:], ends)
        bos = bos if len(bos) else np.zeros(pieces, np.int64)
        return cls(first, counts.reshape(blocks, 4), document, offset, length, rest, bos)


def pack(
    lengths: Ints,
    keep: NDArray[np.bool_],
    *,
    block_size: int,
    strategy: str,
    eos: bool,
    bos: bool = False,
) -> PackIndex:
    """Blocks of the kept documents. lengths: tokens of each, without the EOS and BOS that are added."""
    kept = np.flatnonzero(keep & (lengths + eos > 0))
    offsets = (np.cumsum(lengths) - lengths)[kept]
    begins = np.full_like(kept, bos)
    whole = Fragments(kept, offsets - begins, lengths[kept] + begins + int(eos), np.zeros_like(kept), begins)
    return pack_fragments(whole, block_size=block_size, strategy=strategy, eos=eos)


def pack_fragments(fragments: Fragments, *, block_size: int, strategy: str, eos: bool) -> PackIndex:
    """Blocks that hold every input of the fragments once. eos: whether documents end with an added EOS."""
    cut = _best_fit if strategy == "best_fit" else _concat
    row, start, length, block = cut(fragments.length, block_size)
    rest = fragments.rest[row] + fragments.length[row] - start - length
    bos = np.where(start == 0, fragments.bos[row], 0)
    first = np.searchsorted(block, np.arange(int(block[-1]) + 2 if len(block) else 1))
    counts = _counts(first, length, rest, bos, block_size, eos)
    document, offset = fragments.document[row], fragments.offset[row] + start
    return PackIndex(first, counts, document, offset, length, rest, bos)


def _counts(first: Ints, length: Ints, rest: Ints, bos: Ints, block_size: int, eos: bool) -> Ints:
    if len(first) == 1:
        return np.zeros((0, 4), np.int64)
    filled = np.add.reduceat(length, first[:-1])
    ends = np.add.reduceat((rest == 0).astype(np.int64), first[:-1])
    added = ends * int(eos)
    tokens = filled - added - np.add.reduceat(bos, first[:-1])
    return np.stack([tokens, added, block_size - filled, filled - ends], axis=1)


Cuts = tuple[Ints, Ints, Ints, Ints]
"""For each piece, in order of blocks: row of its fragment, start in the fragment, length, and block."""


def _concat(inputs: Ints, block_size: int) -> Cuts:
    begins = np.cumsum(inputs) - inputs
    total = int(inputs.sum())
    starts = np.sort(np.concatenate([begins, np.arange(0, total, block_size)]), kind="stable")
    starts = starts[np.diff(starts, prepend=-1) > 0]
    row = np.searchsorted(begins, starts, side="right") - 1
    return row, starts - begins[row], np.diff(starts, append=total), starts // block_size


def _best_fit(inputs: Ints, block_size: int) -> Cuts:
    whole, left = np.divmod(inputs, block_size)
    n_whole = int(whole.sum())
    row = np.repeat(np.arange(len(inputs)), whole)
    start = (np.arange(n_whole) - np.repeat(np.cumsum(whole) - whole, whole)) * block_size
    longest_first = np.argsort(block_size - left, kind="stable")
    longest_first = longest_first[: np.count_nonzero(left)]
    bins = best_fit_decreasing(left[longest_first], block_size)
    by_bin = np.argsort(bins, kind="stable")
    tail = longest_first[by_bin]
    return (
        np.concatenate([row, tail]),
        np.concatenate([start, whole[tail] * block_size]),
        np.concatenate([np.full(n_whole, block_size), left[tail]]),
        np.concatenate([np.arange(n_whole), n_whole + bins[by_bin]]),
    )


def best_fit_decreasing(sizes: Ints, capacity: int) -> Ints:
    """Bin of each item, int64. `sizes` descend and lie in [1, capacity].

    Items of one size are placed together. The bin with the least room that fits takes as many of them as it
    can, because after each item it is still the bin with the least room. So there is one step for each size
    and each class of bins with equal room: O(capacity) steps, whatever the number of items.
    """
    bins = np.empty(len(sizes), np.int64)
    rooms = _Rooms(capacity)
    edges = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)] if len(sizes) else [0]
    for begin, end in pairwise(edges):
        size, item = int(sizes[begin]), begin
        while item < end:
            room = rooms.least(size)
            each = min(room // size, end - item)
            taken = rooms.take(room, (end - item) // each)
            bins[item : item + each * len(taken)] = np.repeat(taken, each)
            item += each * len(taken)
            rooms.put(room - each * size, taken)
    return bins


class _Rooms:
    """Open bins by the room that they have left. `occurring`: bit r is set if a bin has room r."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.n_bins, self.occurring = capacity, 0, 0
        self.bins: list[list[Ints]] = [[] for _ in range(capacity + 1)]

    def least(self, size: int) -> int:
        """The least room that holds `size`; a new bin's if no open one does."""
        fitting = self.occurring >> size
        return size + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity

    def take(self, room: int, at_most: int) -> Ints:
        """Numbers of bins with this room, which are no longer open; new bins if no open one has it."""
        if not self.bins[room]:
            self.n_bins += at_most
            return np.arange(self.n_bins - at_most, self.n_bins)
        bins = np.concatenate(self.bins[room])
        self.bins[room] = [bins[at_most:]] if len(bins) > at_most else []
        self.occurring ^= 0 if self.bins[room] else 1 << room
        return bins[:at_most]

    def put(self, room: int, bins: Ints) -> None:
        if room:
            self.bins[room].append(bins)
            self.occurring |= 1 << room


@dataclass(frozen=True)
class Blocks:
    """How pieces of token arrays become rows of a batch. eos, bos: ids added to each document, if any."""

    block_size: int
    document_mask: bool
    eos: int | None
    padding: int
    bos: int | None = None

    def empty(self, samples: Ints) -> Batch:
        """A batch of padding. samples: int64 [B], each row's number in the run, -1 for a row of padding.

        input_ids, labels, position_ids: int64 [B, T].  sample: int64 [B].  document_lengths: int32 [B, T],
        the lengths of a row's documents from left to right, then zeros. They add up to T: each piece counts
        as a document, and so does the padding at the end. A row of padding is one document, and so is a row
        in which attention crosses documents.
        """
        shape = (len(samples), self.block_size)
        document_lengths = np.zeros(shape, np.int32)
        document_lengths[:, 0] = self.block_size
        return {
            "input_ids": np.full(shape, self.padding, np.int64),
            "labels": np.full(shape, IGNORED, np.int64),
            "position_ids": np.tile(np.arange(self.block_size), (len(samples), 1)),
            "document_lengths": document_lengths,
            "sample": samples.astype(np.int64),
        }

    def fill(self, batch: Batch, row: int, tokens: NDArray[np.integer], index: PackIndex, block: int) -> None:
        """Write a block into a row of an `empty` batch. index, tokens: of the block's shard."""
        pieces = slice(int(index.first[block]), int(index.first[block + 1]))
        offset, length, rest = index.offset[pieces], index.length[pieces], index.rest[pieces]
        stop = np.cumsum(length)
        start, filled = stop - length, int(stop[-1])
        column = _COLUMNS[:filled] if filled <= len(_COLUMNS) else np.arange(filled)
        input_ids, labels = batch["input_ids"][row], batch["labels"][row]
        # An added EOS or BOS is not in `tokens`. Its place is read all the same (`clip` allows that behind
        # the last token and in front of the first) and then overwritten.
        input_ids[:filled] = tokens.take(np.repeat(offset - start, length) + column, mode="clip")
        following = tokens.take(offset + length, mode="clip").astype(np.int64)
        if self.eos is not None:
            input_ids[stop[rest == 0] - 1] = self.eos
            following[rest == 1] = self.eos
        if self.bos is not None:
            input_ids[start[index.bos[pieces] == 1]] = self.bos
        following[rest == 0] = IGNORED
        labels[: filled - 1] = input_ids[1:filled]
        labels[stop - 1] = following
        if self.document_mask:
            positions = batch["position_ids"][row]
            positions[:filled] -= np.repeat(start, length)
            positions[filled:] -= filled
            document_lengths = batch["document_lengths"][row]
            document_lengths[: len(length)] = length
            if filled < self.block_size:
                document_lengths[len(length)] = self.block_size - filled


_COLUMNS = np.arange(1 << 16)
