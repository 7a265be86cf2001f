"""The g-th sample of a run: a pure function of (logs, mixture, packing, seed, g)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints, TokenLog, open_log
from raydist.errors import EmptyCorpus, LogError
from raydist.feed.mixture import Mixture
from raydist.feed.order import Span, Stream
from raydist.feed.packing import REVISION, Batch, Blocks, PackIndex
from raydist.feed.packs import FeedSource, PackedSource
from raydist.job.schema import Job, Packing

if TYPE_CHECKING:
    from raydist.feed.loader import Step


POLL_SECONDS = 1.0


class Counts(NamedTuple):
    """Inputs that are document tokens, added EOS and padding, and inputs with a label."""

    n_tokens: int
    n_eos: int
    n_padding: int
    n_labels: int


class Place(NamedTuple):
    """Where a sample comes from: the source, the shard of its log, the block of the shard."""

    source: int
    shard: int
    block: int


class Feed:
    """Packed blocks in the order of a run, without end: epoch after epoch, each in an order of its own.

    Weighted sources are one stream each, mixed by Tijdeman's rule. Without weights the shards of all
    sources are merged into one stream, and an epoch is every document once.

    Raises EmptyCorpus if a stream has no block, LogError if the logs do not belong together.
    """

    def __init__(self, sources: Sequence[FeedSource], packing: Packing, seed: int, holdout: float) -> None:
        self._made_of = (tuple(sources), packing, seed, holdout)
        self.packing, self.seed, self.holdout = packing, seed, holdout
        self.blocks = blocks_for([source.log for source in sources], packing)
        self.sources = tuple(PackedSource(source, packing, holdout) for source in sources)
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and len(weights) != len(sources):
            raise ValueError("give every source a weight, or none")
        self.mixture = Mixture(weights) if weights else None
        self._shards = self._shards_by_source() if weights else [self._shards_merged()]
        self.streams = tuple(self._stream(shards) for shards in self._shards)
        self._refuse_empty()
        # Samples of a window are drawn from all of its shards: one that is closed too early is read again.
        open_at_once = (packing.window_shards + 1) * len(self.streams)
        self._open = lru_cache(maxsize=min(256, max(32, open_at_once)))(self._open_shard)

    def __reduce__(self) -> tuple[object, ...]:
        return Feed, self._made_of

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples in which every document occurs once; None for a weighted mixture, or while a log grows."""
        return None if self.mixture or not self.complete else self.streams[0].n_blocks

    @property
    def complete(self) -> bool:
        """Whether every log is; else the streams end with the last whole window that is there."""
        return all(source.log.complete for source in self.sources)

    @property
    def completed(self) -> bool:
        """Whether every log is by now; a feed does not change, so open a new one."""
        return all((source.log.path / "manifest.json").exists() for source in self.sources)

    def covers(self, g: int) -> bool:
        """Whether the logs are long enough for the first g samples of the run."""
        if self.complete:
            return True
        growing = (
            [not source.log.complete for source in self.sources] if self.mixture else [not self.complete]
        )
        known = zip(self.consumed(g), self.streams, growing, strict=True)
        return all(n <= stream.n_blocks for n, stream, grows in known if grows)

    def grown(self, g: int, while_waiting: Callable[[], None]) -> Feed:
        """This feed once it covers the first g samples; waits for the logs to grow.

        while_waiting: called every POLL_SECONDS of it; raises to end it.
        """
        feed, seen = self, -1
        while not feed.covers(g):
            while (there := feed._windows_there()) == seen:
                while_waiting()
                time.sleep(POLL_SECONDS)
            sources = [replace(s, log=open_log(s.log.path, growing=True)) for s in feed._made_of[0]]
            feed, seen = Feed(sources, self.packing, self.seed, self.holdout), there
        return feed

    def _windows_there(self) -> int:
        """Grows whenever opening the logs anew may give another window."""
        paths = [source.log.path for source in self.sources if not source.log.complete]
        counts = [len(list(path.glob("slices/*.json"))) // self.packing.window_shards for path in paths]
        return sum(counts) + sum((path / "manifest.json").exists() for path in paths)

    @property
    def fingerprint(self) -> str:
        """Of all that decides what the g-th sample is."""
        parts = {
            "revision": REVISION,
            "logs": [source.log.fingerprint for source in self.sources],
            "mixture": self.mixture.units.tolist() if self.mixture else None,
            "packing": self.packing.model_dump(),
            "seed": self.seed,
            "holdout": self.holdout,
        }
        return xxhash.xxh3_128_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))

    def block(self, g: int) -> dict[str, Ints | int]:
        """The g-th sample of the run: input_ids, labels, position_ids, int64[T], and sample = g."""
        batch = self.batch([g])
        return {name: int(array[0]) if name == "sample" else array[0] for name, array in batch.items()}

    def batch(self, samples: Sequence[int] | Ints) -> Batch:
        """Samples as int64[B, T], and `sample`, int64[B]. Sample -1 is padding: labels all -100."""
        return self.read(samples)[0]

    def read(self, samples: Sequence[int] | Ints) -> tuple[Batch, Ints]:
        """`batch`, and the four Counts of each sample, int64[B, 4], zeros for -1."""
        numbers = np.asarray(samples, np.int64)
        batch, counts = self.blocks.empty(numbers), np.zeros((len(numbers), 4), np.int64)
        rows = np.flatnonzero(numbers >= 0)
        for row, place in zip(rows.tolist(), self.places(numbers[rows]), strict=True):
            index, tokens = self._open(place.source, place.shard)
            self.blocks.fill(batch, row, tokens, index, place.block)
            counts[row] = index.counts[place.block]
        return batch, counts

    def loader(
        self,
        rank: int,
        world_size: int,
        start: int = 0,
        stop: int | None = None,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Step]:
        """Steps (see `loader.Step`) of samples [start, stop) for one rank; without end if `stop` is None.

        Closing the iterator, or dropping it, ends its thread. while_waiting: see `grown`.
        """
        from raydist.feed.loader import ahead, global_batches, read_step  # torch is needed only here

        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")

        def steps(feed: Feed) -> Iterator[Step]:
            for lo, hi in global_batches(start, stop, global_batch_size):
                feed = feed.grown(hi, while_waiting)
                yield read_step(feed, lo, hi, rank, world_size, micro_batch_size)

        return ahead(steps(self))

    def counts(self, start: int, stop: int) -> Counts:
        """Of samples [start, stop)."""
        total = np.zeros(4, np.int64)
        for number, (lo, hi) in enumerate(zip(self.consumed(start), self.consumed(stop), strict=True)):
            for span in self.streams[number].spans(lo, hi):
                total += self._count_span(number, span)
        return Counts(*total.tolist())

    def places(self, samples: Ints) -> list[Place]:
        """Where each sample (not -1) comes from."""
        streams, nth = self.mixture.locate(samples) if self.mixture else (np.zeros_like(samples), samples)
        places: list[Place] = [Place(-1, -1, -1)] * len(samples)
        for number in np.unique(streams).tolist():
            rows = np.flatnonzero(streams == number)
            shards, blocks = self.streams[number].locate(nth[rows])
            for row, shard, block in zip(rows.tolist(), shards.tolist(), blocks.tolist(), strict=True):
                source, of_source = self._shards[number][shard]
                places[row] = Place(source, of_source, block)
        return places

    def consumed(self, g: int) -> list[int]:
        """Samples of each stream among the first g of the run."""
        return [int(n) for n in self.mixture.before(g)] if self.mixture else [g]

    def block_counts(self, stream: int, positions: Ints) -> Ints:
        """The four Counts of blocks at ascending positions of a stream, int64[N, 4]."""
        shards, blocks = self.streams[stream].split(positions)
        parts = [np.zeros((0, 4), np.int64)]
        for shard in np.unique(shards).tolist():
            index, _ = self._open(*self._shards[stream][shard])
            parts.append(index.counts[blocks[shards == shard]])
        return np.concatenate(parts)

    def shard_counts(self, stream: int, shards: range) -> Ints:
        """The four Counts of each of these shards of a stream, int64[len(shards), 4]."""
        places = [self._shards[stream][nth] for nth in shards]
        rows = [[column[shard] for column in self.sources[source].totals[1:5]] for source, shard in places]
        return np.array(rows, np.int64)

    def _count_span(self, number: int, span: Span) -> Ints:
        stream = self.streams[number]
        if span.hi - span.lo == int(stream.window_ends[span.window]) - stream.window_start(span.window):
            counts = self.shard_counts(number, stream.shards_of(span.window))
        else:
            positions = np.sort(stream.order(span.epoch, span.window, np.arange(span.lo, span.hi)))
            counts = self.block_counts(number, positions)
        total: Ints = counts.sum(axis=0)
        return total

    def _open_shard(self, source: int, shard: int) -> tuple[PackIndex, NDArray[np.integer]]:
        return self.sources[source].index(shard), self.sources[source].log.shards[shard].tokens()

    def _shards_by_source(self) -> list[list[tuple[int, int]]]:
        counts = [len(source.log.shards) for source in self.sources]
        return [[(source, shard) for shard in range(count)] for source, count in enumerate(counts)]

    def _shards_merged(self) -> list[tuple[int, int]]:
        """All shards in one order: each log's in its own, spread evenly, so that sources mix."""
        spread = [
            (Fraction(2 * shard + 1, 2 * len(shards)), source, shard)
            for shards in self._shards_by_source()
            for source, shard in shards
        ]
        return [(source, shard) for _, source, shard in sorted(spread)]

    def _stream(self, shards: list[tuple[int, int]]) -> Stream:
        if not all(self.sources[source].log.complete for source, _ in shards):
            shards = shards[: len(shards) // self.packing.window_shards * self.packing.window_shards]
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
                    why=f"the log is empty, or holdout {self.holdout:g} keeps all of it for evaluation",
                    fix="add documents, loosen corpus.clean or lower corpus.holdout",
                )


def open_sources(job: Job, logs: Mapping[str, TokenLog]) -> Feed:
    """The feed of a job whose sources have these logs, by name."""
    sources = [FeedSource(name, logs[name], source.weight) for name, source in job.corpus.sources.items()]
    return Feed(sources, job.packing, job.seed, job.corpus.holdout)


def blocks_for(logs: Sequence[TokenLog], packing: Packing) -> Blocks:
    """How blocks of these logs are made. Raises LogError if their tokenizers differ or lack an EOS."""
    ids = {(log.tokenizer, log.vocab_size, log.eos_token_id) for log in logs}
    if len(ids) != 1:
        raise LogError(
            f"{len(logs)} logs of {len(ids)} different tokenizers",
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
    return Blocks(packing.block_size, packing.document_mask, added, padding=eos if eos is not None else 0)
