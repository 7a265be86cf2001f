"""The g-th sample of a run: a pure function of (token logs, mixtures, packing, stages, seed, g)."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import orjson
import xxhash

from raydist.corpus.log import Ints, Shard, TokenLog, open_log
from raydist.feed.pack_index import FeedSource
from raydist.feed.packing import REVISION, Batch, Block
from raydist.feed.selection import select
from raydist.feed.stage import Counts, Stage
from raydist.job.plan import Mix, Stretch, stretches
from raydist.job.schema import Job, Packing

if TYPE_CHECKING:
    from raydist.feed.loader import Step, Tensors


POLL_SECONDS = 1.0
"""Between two looks at token logs that grow."""


class Feed:
    """Packed blocks in the order of a run, without end.

    holdout: share of the documents held out for evaluation.  dedup: whether documents whose text occurred
    before are left out.  stretches: how many samples of which block size follow each other, in place of
    packing's one; the last has no end.  mixes: where the sources and weights of the run changed: those that
    it began with, then each change. The sources of a mix are the first ones of the next, those of the last
    are `sources`. Not with stretches.  on_packed: called after each shard that is packed.  bos: the id that
    each document begins with; None for none.

    `sources` and `streams` are those of the last stage, which has all of them. Raises what Stage does.
    """

    def __init__(
        self,
        sources: Sequence[FeedSource],
        packing: Packing,
        seed: int,
        holdout: float,
        *,
        dedup: bool = False,
        stretches: Sequence[Stretch] = (),
        mixes: Sequence[Mix] = (),
        on_packed: Callable[[], None] = lambda: None,
        bos: int | None = None,
    ) -> None:
        self._made_of = (tuple(sources), packing, seed, holdout)
        self._options = {"dedup": dedup, "stretches": tuple(stretches), "mixes": tuple(mixes), "bos": bos}
        self.packing, self.seed, self.stretches, self.bos = packing, seed, tuple(stretches), bos
        self.holdout, self.dedup = holdout, dedup
        selections = select([source.log for source in sources], holdout, dedup=dedup)
        self.stages: list[Stage] = []
        for start, of_stage, size in _stages(sources, packing, stretches, mixes):
            resized = packing.model_copy(update={"block_size": size})
            before = self.stages[-1] if self.stages else None
            chosen = selections[: len(of_stage)]
            self.stages.append(Stage(of_stage, chosen, resized, seed, before, start, on_packed, bos=bos))
        self.sources, self.streams = self.stages[-1].sources, self.stages[-1].streams

    def __reduce__(self) -> tuple[object, ...]:
        return _made, (self._made_of, self._options)

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples in which every document occurs once.

        None for a weighted mixture, for stages, for a run whose mixture changes, or while a token log grows.
        """
        fixed = self.complete and len(self.stages) == 1 and not self.stages[0].mixture
        return self.streams[0].n_blocks if fixed else None

    @property
    def complete(self) -> bool:
        """Whether every token log is; if not, the streams end with the last window whose shards all exist."""
        return all(source.log.complete for source in self.sources)

    @property
    def completed(self) -> bool:
        """Whether every token log is complete by now. A feed does not change: open a new one."""
        return all(source.log.folder.complete() for source in self.sources)

    def covers(self, g: int) -> bool:
        """Whether the token logs are long enough for the first g samples of the run."""
        if self.complete:
            return True
        (stage,) = self.stages  # several stages wait for whole token logs
        growing = [not source.log.complete for source in self.sources]
        growing = growing if stage.mixture else [any(growing)]
        known = zip(stage.consumed(g), stage.streams, growing, strict=True)
        return all(n <= stream.n_blocks for n, stream, grows in known if grows)

    def grown(self, g: int, while_waiting: Callable[[], None]) -> Feed:
        """This feed, opened again until it covers the first g samples; waits for the token logs to grow.

        while_waiting: called every POLL_SECONDS meanwhile; raises to end the wait.
        """
        feed, opened = self, -1
        while not feed.covers(g):
            while (available := feed._windows_available()) == opened:
                while_waiting()
                time.sleep(POLL_SECONDS)
            sources = [replace(s, log=open_log(s.log.path, growing=True)) for s in feed._made_of[0]]
            feed = Feed(sources, self.packing, self.seed, self.holdout, bos=self.bos)
            opened = available
        return feed

    def _windows_available(self) -> int:
        """Grows whenever opening the token logs again may give another window."""
        folders = [source.log.folder for source in self.sources if not source.log.complete]
        counts = [len(folder.committed()) // self.packing.window_shards for folder in folders]
        return sum(counts) + sum(folder.complete() for folder in folders)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what the g-th sample is."""
        return self.fingerprint_at(None)

    def fingerprint_at(self, g: int | None) -> str:
        """A hash of all that decides what the first g samples are; None: all samples.

        It does not change when the mixture changes from sample g on.
        """
        first, *later = self.stages
        changes = [] if self.stretches else [stage for stage in later if g is None or stage.start < g]
        parts = {
            "revision": REVISION,
            **_mixture_of(first),
            "packing": self.packing.model_dump(exclude={"add_bos_token"}),
            "seed": self.seed,
            "holdout": self.holdout,
        }
        # Left out where not used, so that the fingerprint in older checkpoints stays the same.
        parts |= {"changes": [[stage.start, _mixture_of(stage)] for stage in changes]} if changes else {}
        parts |= {"dedup": parts["logs"]} if self.dedup else {}
        parts |= {"stages": [list(stage) for stage in self.stretches]} if self.stretches else {}
        parts |= {"bos": self.bos} if self.bos is not None else {}
        return xxhash.xxh3_128_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))

    def stage_number(self, g: int) -> int:
        """The stage of the run's sample g."""
        return bisect_right([stage.start for stage in self.stages], g) - 1

    def block(self, g: int) -> Block:
        """The g-th sample of the run: a row of `batch`, arrays [T], and sample = g."""
        row: dict[str, Any] = {name: array[0] for name, array in self.batch([g]).items()}
        return cast(Block, {**row, "sample": g})

    def batch(self, samples: Sequence[int] | Ints) -> Batch:
        """Samples of the run as arrays [B, T], see `Blocks.empty`. Sample -1 is padding: labels all -100.

        Raises ValueError for samples of several stages: their blocks differ in size.
        """
        samples = np.asarray(samples, np.int64)
        stages = {self.stage_number(int(g)) for g in samples if g >= 0} or {0}
        if len(stages) > 1:
            starts = [stage.start for stage in self.stages]
            raise ValueError(f"samples of several stages in one batch; the stages begin at {starts}")
        return self.stages[stages.pop()].read(samples)[0]

    def loader(
        self,
        rank: int,
        world_size: int,
        start: int = 0,
        stop: int | None = None,
        *,
        global_batch_size: int | Sequence[int],
        micro_batch_size: int | Sequence[int],
        while_waiting: Callable[[], None] = lambda: None,
        on_shards: Callable[[Sequence[Shard]], None] = lambda shards: None,
        on_next: Callable[[Sequence[Shard]], None] | None = None,
        collate: Callable[[Tensors], Tensors] | None = None,
        place: Callable[[Tensors], Tensors] | None = None,
    ) -> Iterator[Step]:
        """Steps (see `loader.Step`) of samples [start, stop) for one rank; without end if `stop` is None.

        Both sizes count sequences: one number for all stages, or one for each. Closing or dropping the
        iterator ends its thread. while_waiting: see `grown`. on_shards: called with the shards of each global
        batch, all ranks' together, before they are read.  on_next: with those that come after them, some time
        before. collate, place: see `loader.read_step`.
        """
        from raydist.feed.loader import global_batches, prefetch, read_step  # torch is needed only here

        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        batches, micro = self.for_each_stage(global_batch_size), self.for_each_stage(micro_batch_size)

        def steps(feed: Feed) -> Iterator[Step]:
            for stage, lo, hi in global_batches([s.start for s in feed.stages], start, stop, batches):
                feed = feed.grown(hi, while_waiting)
                on_shards(feed.stages[stage].shards_read(lo, hi))
                if on_next is not None:
                    on_next(feed.stages[stage].shards_after(hi))
                yield read_step(feed.stages[stage], lo, hi, rank, world_size, micro[stage], collate, place)

        return prefetch(steps(self))

    def for_each_stage(self, size: int | Sequence[int]) -> Sequence[int]:
        """Of all stages, or one for each."""
        return [size] * len(self.stages) if isinstance(size, int) else size

    def counts(self, start: int, stop: int) -> Counts:
        """The sums over samples [start, stop)."""
        each = [stage.counts(lo, hi) for stage, lo, hi in self.parts(start, stop)]
        return Counts(*(sum(column) for column in zip(*each, strict=True))) if each else Counts(*[0] * 5)

    def parts(self, start: int, stop: int) -> Iterator[tuple[Stage, int, int]]:
        """Samples [start, stop), a stage at a time: (stage, first sample, end)."""
        ends = [stage.start for stage in self.stages[1:]]
        for stage, end in zip(self.stages, [*ends, stop], strict=True):
            lo, hi = max(start, stage.start), min(stop, end)
            if lo < hi:
                yield stage, lo, hi


def _stages(
    sources: Sequence[FeedSource], packing: Packing, stretches: Sequence[Stretch], mixes: Sequence[Mix]
) -> Iterator[tuple[int, Sequence[FeedSource], int]]:
    """First sample, sources and block size of each stage."""
    if not mixes:
        sizes = [stage.block_size for stage in stretches] or [packing.block_size]
        starts = [0, *accumulate(stage.samples for stage in stretches[:-1])]
        yield from ((start, sources, size) for start, size in zip(starts, sizes, strict=True))
        return
    for start, weights in mixes:
        of_stage = [replace(source, weight=weights[source.name]) for source in sources[: len(weights)]]
        yield start, of_stage, packing.block_size


def _mixture_of(stage: Stage) -> dict[str, Any]:
    units = stage.mixture.units.tolist() if stage.mixture else None
    return {"logs": [source.log.fingerprint for source in stage.sources], "mixture": units}


def _made(made_of: tuple[Sequence[FeedSource], Packing, int, float], options: dict[str, object]) -> Feed:
    return Feed(*made_of, **options)  # type: ignore[arg-type]


def make_feed(
    job: Job,
    logs: Mapping[str, TokenLog],
    on_packed: Callable[[], None] = lambda: None,
    *,
    bos: int | None,
    mixes: Sequence[Mix] = (),
) -> Feed:
    """The feed of a job. logs: the token log of each source, by name.  on_packed, bos, mixes: see Feed."""
    weights = mixes[-1].weights if mixes else job.corpus.weights
    sources = [FeedSource(name, logs[name], weight) for name, weight in weights.items()]
    dedup, lengths = job.corpus.dedup == "exact", stretches(job) if job.stages else ()
    return Feed(
        sources,
        job.packing,
        job.seed,
        job.corpus.holdout,
        dedup=dedup,
        stretches=lengths,
        mixes=mixes,
        on_packed=on_packed,
        bos=bos,
    )
