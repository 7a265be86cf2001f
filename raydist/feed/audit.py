"""What became of every document token after some samples: trained, held out, skipped, dropped or left."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from raydist.corpus.log import Ints
from raydist.errors import LogError
from raydist.feed.feed import Feed
from raydist.feed.packing import PackIndex
from raydist.feed.shuffle import HEAD, Span
from raydist.feed.stage import Stage

Ranges = Sequence[tuple[int, int]]
"""Samples [start, stop) each, in order and apart."""

Reads = list[tuple[PackIndex, Ints]]
"""The blocks of one shard that were read, and the index that they are blocks of."""


@dataclass(frozen=True)
class Audit:
    """Document tokens, without EOS and BOS: n_in = n_trained + n_held_out + n_duplicate + n_skipped + n_left.

    n_trained: tokens that were an input of a trained sample at least once.  n_repeated: how often they were
    an input again.  n_skipped: tokens that were an input of skipped samples alone.  n_duplicate: tokens of
    documents, not held out, that are left out because their text occurred before.  n_samples: those trained.
    n_eos, n_padding, n_bos: their added EOS, padding and added BOS inputs.
    """

    n_in: int
    n_trained: int
    n_held_out: int
    n_left: int
    n_repeated: int
    n_samples: int
    n_eos: int
    n_padding: int
    n_duplicate: int = 0
    n_bos: int = 0
    n_skipped: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def audit(feed: Feed, n_samples: int, skipped: Ranges = ()) -> Audit:
    """After the first `n_samples` of a run, without those that were `skipped`.

    Each number is counted by itself; LogError if they do not add up. A window that was only trained, and as a
    whole, is counted by the sums of its shards, any other token by token.
    """
    trained_ranges, total = _others(skipped, n_samples), np.zeros(4, np.int64)
    for number in range(len(feed.streams)):
        whole, reads = _visits(feed, number, trained_ranges)
        passed_over = _skipped_reads(feed, number, skipped)
        for window in range(len(feed.streams[number].window_ends)):
            for place in feed.stages[-1].shards_of(number, window):
                of_shard = reads.get(place, []), passed_over.get(place, [])
                total += _count_shard(feed, *place, whole[window], *of_shard)
    trained, left, repeated, only_skipped = total.tolist()
    counts = [feed.counts(start, stop) for start, stop in trained_ranges]
    n_in = sum(source.log.n_tokens for source in feed.sources)
    held_out = sum(source.held_out_tokens for source in feed.sources)
    dropped = sum(source.duplicate_tokens for source in feed.sources)
    result = Audit(
        n_in=n_in,
        n_trained=trained,
        n_held_out=held_out,
        n_left=left,
        n_repeated=repeated,
        n_samples=sum(stop - start for start, stop in trained_ranges),
        n_eos=sum(each.n_eos for each in counts),
        n_padding=sum(each.n_padding for each in counts),
        n_duplicate=dropped,
        n_bos=sum(each.n_bos for each in counts),
        n_skipped=only_skipped,
    )
    _check(feed, result)
    return result


def _others(skipped: Ranges, n_samples: int) -> list[tuple[int, int]]:
    """The ranges of the first `n_samples` between those skipped, which are in order and apart."""
    starts, ends = [0, *(stop for _, stop in skipped)], [*(start for start, _ in skipped), n_samples]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _visits(feed: Feed, number: int, ranges: Ranges) -> tuple[Counter[int], dict[tuple[int, int], Reads]]:
    """For a stream: how often each window was read as a whole, and other reads, by (source, shard)."""
    whole: Counter[int] = Counter()
    reads: dict[tuple[int, int], Reads] = defaultdict(list)
    for stage, span in _spans(feed, number, ranges):
        if span.window != HEAD and stage.is_whole(number, span):
            whole[span.window] += 1
            continue
        for source, shard, index, blocks in stage.indexes(number, span):
            reads[source, shard].append((index, blocks))
    return whole, reads


def _skipped_reads(feed: Feed, number: int, ranges: Ranges) -> dict[tuple[int, int], Reads]:
    """For a stream, by (source, shard)."""
    reads: dict[tuple[int, int], Reads] = defaultdict(list)
    for stage, span in _spans(feed, number, ranges):
        for source, shard, index, blocks in stage.indexes(number, span):
            reads[source, shard].append((index, blocks))
    return reads


def _spans(feed: Feed, number: int, ranges: Ranges) -> Iterator[tuple[Stage, Span]]:
    """What ranges of samples read from a stream."""
    for start, stop in ranges:
        for stage, lo, hi in feed.parts(start, stop):
            yield from ((stage, span) for stream, span in stage.spans(lo, hi) if stream == number)


def _count_shard(feed: Feed, source: int, shard: int, whole: int, reads: Reads, skipped: Reads) -> Ints:
    """Tokens trained, left, repeated and skipped, int64 [4], of a shard's documents that are not left out."""
    packed = feed.sources[source]
    n_tokens = int(packed.totals.tokens[shard])
    if not reads and not (skipped and not whole):
        return np.array([n_tokens, 0, n_tokens * (whole - 1), 0] if whole else [0, n_tokens, 0, 0], np.int64)
    index, length = packed.index(shard), packed.log.shards[shard].n_tokens
    eos = feed.packing.add_eos_token
    to_train = _times([(index, np.arange(index.n_blocks))], length, eos)
    times = whole * to_train + _times(reads, length, eos)
    seen = times > 0
    only_skipped = ~seen & (_times(skipped, length, eos) > 0)
    left = (to_train > 0) & ~seen & ~only_skipped
    return np.array([seen.sum(), left.sum(), (times - seen).sum(), only_skipped.sum()], np.int64)


def _times(reads: Reads, n_tokens: int, eos: bool) -> Ints:
    """How often each token of a shard was in the blocks read, int64 [n_tokens], without added EOS and BOS."""
    steps = np.zeros(n_tokens + 1, np.int64)
    for index, blocks in reads:
        read = index.fragments(blocks)
        ends = read.offset + read.length - ((read.rest == 0) & eos)
        np.add.at(steps, read.offset + read.bos, 1)
        np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1])


def _check(feed: Feed, result: Audit) -> None:
    parts = (result.n_trained, result.n_held_out, result.n_duplicate, result.n_skipped, result.n_left)
    accounted = sum(parts)
    if accounted != result.n_in:
        raise LogError(
            f"{result.n_in} tokens in, but {result.n_trained} trained + {result.n_held_out} held out "
            f"+ {result.n_duplicate} duplicate + {result.n_skipped} skipped + {result.n_left} left"
            f" = {accounted}",
            where=", ".join(str(source.log.path) for source in feed.sources),
            why="the token logs or their pack indexes are not what the feed was made of",
            fix=f"delete {feed.sources[0].folder.parent}, which is made again, and submit the job again;"
            " if that does not help, delete the token logs as well: `raydist prepare` makes them again",
        )
