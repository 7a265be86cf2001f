"""A stretch of a run with one block size and one mixture: which block is its n-th sample, what it holds.

A run has one stage, or one for each of its `stages`, or one for each change of its sources and weights. A
later stage first packs again, in its own block size, what the stage before it left unread of the windows it
had open. Then it continues with the windows after these. So nothing is lost or repeated, whatever the block
size and the weights become. The streams of new sources begin at their first window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydist.corpus.log import Ints, Shard, TokenLog
from raydist.errors import EmptyCorpus, LogError
from raydist.feed.mixture import Mixture
from raydist.feed.pack_index import FeedSource, PackedSource
from raydist.feed.packing import Batch, Blocks, PackIndex, pack_fragments
from raydist.feed.selection import Selection
from raydist.feed.shuffle import HEAD, Span, Stream
from raydist.job.schema import Packing


class Counts(NamedTuple):
    """Inputs that are document tokens, added EOS and padding, inputs with a label, and added BOS."""

    n_tokens: int
    n_eos: int
    n_padding: int
    n_labels: int
    n_bos: int


class Place(NamedTuple):
    """Where a sample comes from: the source, the shard of its token log, the block of the shard.

    stream: number of the stream.  stream_shard: number of the shard in it. In the stream's head, `block`
    counts the blocks of what was left of the shard.
    """

    source: int
    shard: int
    block: int
    stream: int
    stream_shard: int


class Stage:
    """Packed blocks in order, without end: epoch after epoch, each in an order of its own.

    Weighted sources are one stream each, mixed by Tijdeman's rule. Without weights the shards of all
    sources are merged into one stream, and an epoch is every document once. selections: one for each source.
    start: the sample of the run that the stage begins with; samples are numbered from the start of the run.
    before: the stage that it follows, whose streams are the first ones of this one.  on_packed: called after
    each shard that is packed.  bos: the id that each document begins with; None for none.

    Raises EmptyCorpus if a stream has no block, LogError if the token logs do not belong together.
    """

    def __init__(
        self,
        sources: Sequence[FeedSource],
        selections: Sequence[Selection],
        packing: Packing,
        seed: int,
        before: Stage | None = None,
        start: int = 0,
        on_packed: Callable[[], None] = lambda: None,
        *,
        bos: int | None = None,
    ) -> None:
        self.packing, self.seed, self.start = packing, seed, start
        self.blocks = blocks_for([source.log for source in sources], packing, bos)
        self.sources = tuple(
            PackedSource(source, packing, selection, on_packed, bos=bos is not None)
            for source, selection in zip(sources, selections, strict=True)
        )
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and len(weights) != len(sources):
            raise ValueError("give every source a weight, or none")
        self.mixture = Mixture(weights) if weights else None
        self._shards = self._shards_by_source() if weights else [self._shards_merged()]
        self.streams = tuple(self._stream(shards) for shards in self._shards)
        self._heads: list[list[PackIndex]] = [[] for _ in self.streams]
        self._refuse_empty()
        # A window's samples come from all of its shards: one that is closed too early is opened again.
        open_at_once = (packing.window_shards + 1) * len(self.streams)
        self.open = lru_cache(maxsize=min(256, max(32, open_at_once)))(self._open_shard)
        if before is not None:
            self._follow(before)

    def read(self, samples: Ints) -> tuple[Batch, Ints]:
        """Samples of the run as arrays [B, T], see `Blocks.empty`; and the five Counts of each, int64 [B, 5].

        Sample -1 is padding: labels all -100, counts zero.
        """
        batch, counts = self.blocks.empty(samples), np.zeros((len(samples), 5), np.int64)
        rows = np.flatnonzero(samples >= 0)
        for row, place in zip(rows.tolist(), self.places(samples[rows]), strict=True):
            index, tokens = self.open(place.stream, place.stream_shard)
            self.blocks.fill(batch, row, tokens, index, place.block)
            counts[row, :4] = index.counts[place.block]
            counts[row, 4] = self.packing.block_size - counts[row, :3].sum()
        return batch, counts

    def places(self, samples: Ints) -> list[Place]:
        """Where each sample of the run (not -1) comes from."""
        if self.mixture:
            streams, positions = self.mixture.locate(samples - self.start)
        else:
            streams, positions = np.zeros_like(samples), samples - self.start
        places: list[Place] = [Place(-1, -1, -1, -1, -1)] * len(samples)
        for number in np.unique(streams).tolist():
            rows = np.flatnonzero(streams == number)
            shards, blocks = self.streams[number].locate(positions[rows])
            for row, stream_shard, block in zip(rows.tolist(), shards.tolist(), blocks.tolist(), strict=True):
                source, shard = self._shards[number][stream_shard]
                places[row] = Place(source, shard, block, number, stream_shard)
        return places

    def consumed(self, g: int) -> list[int]:
        """Samples of each stream among the stage's samples before the run's sample g."""
        n_samples = max(0, g - self.start)
        return self.mixture.before(n_samples).tolist() if self.mixture else [n_samples]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, Span]]:
        """Samples [start, stop) as (number of a stream, span of it)."""
        bounds = zip(self.consumed(start), self.consumed(stop), strict=True)
        for number, (lo, hi) in enumerate(bounds):
            yield from ((number, span) for span in self.streams[number].spans(lo, hi))

    def counts(self, start: int, stop: int) -> Counts:
        """The sums over samples [start, stop)."""
        total = np.zeros(4, np.int64)
        for number, span in self.spans(start, stop):
            if span.window != HEAD and self.is_whole(number, span):
                for source, shard in self.shards_of(number, span.window):
                    total += [column[shard] for column in self.sources[source].totals[1:5]]
            else:
                parts = self.indexes(number, span)
                total += sum(index.counts[blocks].sum(axis=0) for _, _, index, blocks in parts)
        n_bos = (stop - start) * self.packing.block_size - total[:3].sum()
        return Counts(*[*total.tolist(), int(n_bos)])

    def is_whole(self, number: int, span: Span) -> bool:
        """Whether the span is all of its window."""
        return span.hi - span.lo == self.streams[number].size(span.window)

    def shards_of(self, number: int, window: int) -> list[tuple[int, int]]:
        """(source, shard) of each shard in a window of a stream."""
        return [self._shards[number][stream_shard] for stream_shard in self.streams[number].shards_of(window)]

    def shards_read(self, start: int, stop: int) -> list[Shard]:
        """The shards of the windows that samples [start, stop) come from, each once."""
        found: dict[tuple[int, int], None] = {}
        for number, span in self.spans(start, stop):
            found |= dict.fromkeys(self.shards_of(number, span.window))
        return [self.sources[source].log.shards[shard] for source, shard in found]

    def shards_after(self, g: int) -> list[Shard]:
        """The shards of the windows that follow those of the run's sample g: what is read next."""
        found: dict[tuple[int, int], None] = {}
        for number, n_samples in enumerate(self.consumed(g)):
            _, (_, window) = self.streams[number].left(n_samples)
            found |= dict.fromkeys(self.shards_of(number, window))
        return [self.sources[source].log.shards[shard] for source, shard in found]

    def indexes(self, number: int, span: Span) -> Iterator[tuple[int, int, PackIndex, Ints]]:
        """For each shard that a span reads from: source, shard, the shard's index, and the blocks read."""
        shards, blocks = self.streams[number].places(span)
        for stream_shard in np.unique(shards).tolist():
            source, shard = self._shards[number][stream_shard]
            index, _ = self.open(number, stream_shard)
            yield source, shard, index, np.sort(blocks[shards == stream_shard])

    def _follow(self, before: Stage) -> None:
        """Begin with the unread blocks of the windows that `before` has open, packed again."""
        size, strategy, eos = self.packing.block_size, self.packing.strategy, self.packing.add_eos_token
        streams = list(self.streams)
        for number, n_samples in enumerate(before.consumed(self.start)):
            unread, begins = before.streams[number].left(n_samples)
            for source, shard, index, blocks in before.indexes(number, unread):
                fragments = index.fragments(blocks)
                head = pack_fragments(fragments, block_size=size, strategy=strategy, eos=eos)
                self._heads[number].append(head)
                self._shards[number].append((source, shard))
            sizes = np.array([index.n_blocks for index in self._heads[number]], np.int64)
            streams[number] = replace(streams[number], head=sizes, begins=begins)
        self.streams = tuple(streams)

    def _open_shard(self, number: int, stream_shard: int) -> tuple[PackIndex, NDArray[np.integer]]:
        source, shard = self._shards[number][stream_shard]
        in_head = stream_shard - len(self.streams[number].blocks)
        index = self.sources[source].index(shard) if in_head < 0 else self._heads[number][in_head]
        return index, self.sources[source].log.shards[shard].tokens()

    def _shards_by_source(self) -> list[list[tuple[int, int]]]:
        counts = [len(source.log.shards) for source in self.sources]
        return [[(source, shard) for shard in range(count)] for source, count in enumerate(counts)]

    def _shards_merged(self) -> list[tuple[int, int]]:
        """All shards in one order: each token log's in its own, spread evenly, so that sources mix."""
        spread = [
            (Fraction(2 * shard + 1, 2 * len(shards)), source, shard)
            for shards in self._shards_by_source()
            for source, shard in shards
        ]
        return [(source, shard) for _, source, shard in sorted(spread)]

    def _stream(self, shards: list[tuple[int, int]]) -> Stream:
        if not all(self.sources[source].log.complete for source, _ in shards):
            del shards[len(shards) // self.packing.window_shards * self.packing.window_shards :]
        blocks = np.array([self.sources[source].totals.blocks[shard] for source, shard in shards], np.int64)
        logs = {self.sources[source].log.fingerprint: None for source, _ in sorted(shards)}
        return Stream("+".join(logs), self.seed, blocks, self.packing.window_shards)

    def _refuse_empty(self) -> None:
        for number, stream in enumerate(self.streams):
            if stream.n_blocks == 0:
                sources = self.sources[number : number + 1] if self.mixture else self.sources
                raise EmptyCorpus(
                    f"no document of {', '.join(source.name for source in sources)} is left to train on",
                    where="corpus.sources",
                    why="the token log is empty, or all of it is held out for evaluation, or all its texts"
                    " occur in an earlier source too",
                    fix="add documents, loosen corpus.clean or lower corpus.holdout",
                )


def blocks_for(logs: Sequence[TokenLog], packing: Packing, bos: int | None = None) -> Blocks:
    """How blocks of these token logs are made. Raises LogError if their tokenizers differ or lack an EOS.

    bos: the id that each document begins with; None for none.
    """
    ids = {(log.tokenizer, log.vocab_size, log.eos_token_id) for log in logs}
    if len(ids) != 1:
        raise LogError(
            f"{len(logs)} token logs of {len(ids)} different tokenizers",
            where=", ".join(str(log.path) for log in logs),
            why="the same id would mean different text in each",
            fix="prepare all sources with one tokenizer",
        )
    eos = logs[0].eos_token_id
    if packing.add_eos_token and eos is None:
        raise LogError(
            "the tokenizer has no end-of-sequence token",
            where=str(logs[0].path),
            why="packing.add_eos_token ends every document with it",
            fix="set packing.add_eos_token: false, or use a tokenizer that has one",
        )
    added = eos if packing.add_eos_token else None
    return Blocks(packing.block_size, packing.document_mask, added, eos if eos is not None else 0, bos)
