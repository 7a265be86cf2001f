"""What became of every document token after a number of samples: trained, held out, dropped or left."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

import numpy as np

from raydist.corpus.log import Ints
from raydist.errors import LogError
from raydist.feed.feed import Feed
from raydist.feed.packing import PackIndex
from raydist.feed.shuffle import HEAD

Reads = list[tuple[PackIndex, Ints]]
"""The blocks of one shard that were read, and the index that they are blocks of."""


@dataclass(frozen=True)
class Audit:
    """Document tokens, without EOS and BOS: n_in = n_trained + n_held_out + n_duplicate + n_left.

    n_trained: tokens that were an input of a trained sample at least once.  n_repeated: how often they were
    an input again.  n_duplicate: tokens of documents, not held out, that are left out because their text
    occurred before.  n_samples: trained samples.  n_eos, n_padding, n_bos: their added EOS, padding and added
    BOS inputs.
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

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def audit(feed: Feed, n_samples: int) -> Audit:
    """After the first `n_samples` of a run. Each number is counted by itself; LogError if they do not add up.

    A window that was only read as a whole is counted by the sums of its shards, any other token by token.
    """
    total = np.zeros(3, np.int64)
    for number in range(len(feed.streams)):
        whole, reads = _visits(feed, number, n_samples)
        for window in range(len(feed.streams[number].window_ends)):
            for source, shard in feed.stages[0].shards_of(number, window):
                total += _count_shard(feed, source, shard, whole[window], reads.get((source, shard), []))
    trained, left, repeated = total.tolist()
    counts = feed.counts(0, n_samples)
    n_in = sum(source.log.n_tokens for source in feed.sources)
    held_out = sum(source.held_out_tokens for source in feed.sources)
    dropped = sum(source.duplicate_tokens for source in feed.sources)
    result = Audit(
        n_in=n_in,
        n_trained=trained,
        n_held_out=held_out,
        n_left=left,
        n_repeated=repeated,
        n_samples=n_samples,
        n_eos=counts.n_eos,
        n_padding=counts.n_padding,
        n_duplicate=dropped,
        n_bos=counts.n_bos,
    )
    _check(feed, result)
    return result


def _visits(feed: Feed, number: int, n_samples: int) -> tuple[Counter[int], dict[tuple[int, int], Reads]]:
    """For a stream: how often each window was read as a whole, and other reads, by (source, shard)."""
    whole: Counter[int] = Counter()
    reads: dict[tuple[int, int], Reads] = defaultdict(list)
    for stage, lo, hi in feed.parts(0, n_samples):
        for stream, span in stage.spans(lo, hi):
            if stream != number:
                continue
            if span.window != HEAD and stage.is_whole(number, span):
                whole[span.window] += 1
                continue
            for source, shard, index, blocks in stage.indexes(number, span):
                reads[source, shard].append((index, blocks))
    return whole, reads


def _count_shard(feed: Feed, source: int, shard: int, whole: int, reads: Reads) -> Ints:
    """Tokens trained, left and repeated, int64 [3], of a shard's documents that are not left out."""
    packed = feed.sources[source]
    n_tokens = int(packed.totals.tokens[shard])
    if not reads:
        return np.array([n_tokens, 0, n_tokens * (whole - 1)] if whole else [0, n_tokens, 0], np.int64)
    index, length = packed.index(shard), packed.log.shards[shard].n_tokens
    eos = feed.packing.add_eos_token
    to_train = _times([(index, np.arange(index.n_blocks))], length, eos)
    times = whole * to_train + _times(reads, length, eos)
    seen = times > 0
    return np.array([seen.sum(), (to_train > 0).sum() - seen.sum(), (times - seen).sum()], np.int64)


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
    accounted = result.n_trained + result.n_held_out + result.n_duplicate + result.n_left
    if accounted != result.n_in:
        raise LogError(
            f"{result.n_in} tokens in, but {result.n_trained} trained + {result.n_held_out} held out "
            f"+ {result.n_duplicate} duplicate + {result.n_left} left = {accounted}",
            where=", ".join(str(source.log.path) for source in feed.sources),
            why="the token logs or their pack indexes are not what the feed was made of",
            fix=f"delete {feed.sources[0].folder.parent}, which is made again, and submit the job again;"
            " if that does not help, delete the token logs as well: `raydist prepare` makes them again",
        )
