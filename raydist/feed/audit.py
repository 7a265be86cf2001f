"""Where every document token of the logs is after a number of samples: trained, held out or left."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from raydist.corpus.log import Ints
from raydist.errors import LogError
from raydist.feed.feed import Feed
from raydist.feed.order import Stream


@dataclass(frozen=True)
class Audit:
    """Document tokens, without EOS: n_in = n_trained + n_held_out + n_left.

    n_trained: input of a trained sample at least once.  n_repeated: further times that such were input.
    Of the trained samples: n_samples, and their inputs n_eos (added) and n_padding.
    """

    n_in: int
    n_trained: int
    n_held_out: int
    n_left: int
    n_repeated: int
    n_samples: int
    n_eos: int
    n_padding: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def audit(feed: Feed, n_samples: int) -> Audit:
    """After the first `n_samples` of a run. Each is counted by itself; LogError if they do not add up."""
    trained = left = repeated = eos = padding = 0
    for number, consumed in enumerate(feed.consumed(n_samples)):
        stream = feed.streams[number]
        for window in range(len(stream.window_ends)):
            times, counts = _window(feed, number, window, _visits(stream, window, consumed))
            tokens, seen = counts[:, 0], times > 0
            trained += int(tokens[seen].sum())
            left += int(tokens[~seen].sum())
            repeated += int((tokens * (times - 1))[seen].sum())
            eos += int((counts[:, 1] * times).sum())
            padding += int((counts[:, 2] * times).sum())
    n_in = sum(source.log.n_tokens for source in feed.sources)
    held_out = sum(source.held_out_tokens for source in feed.sources)
    result = Audit(n_in, trained, held_out, left, repeated, n_samples, eos, padding)
    _check(feed, result)
    return result


def _visits(stream: Stream, window: int, consumed: int) -> Ints:
    """How often each block of a window is among the first `consumed` samples of a stream."""
    begin, end = stream.window_start(window), int(stream.window_ends[window])
    epochs, within = divmod(consumed, stream.n_blocks)
    visits = np.zeros(end - begin, np.int64)
    for epoch in range(epochs + 1):
        n = end - begin if epoch < epochs else min(max(within - begin, 0), end - begin)
        if n:
            visits += np.bincount(stream.order(epoch, window, np.arange(n)) - begin, minlength=end - begin)
    return visits


def _window(feed: Feed, number: int, window: int, visits: Ints) -> tuple[Ints, Ints]:
    """Visits and Counts of a window's blocks; of its shards as wholes where all blocks were visited alike."""
    stream = feed.streams[number]
    if len(visits) and visits.min() == visits.max():
        counts = feed.shard_counts(number, stream.shards_of(window))
        return np.full(len(counts), visits[0]), counts
    return visits, feed.block_counts(number, stream.window_start(window) + np.arange(len(visits)))


def _check(feed: Feed, result: Audit) -> None:
    accounted = result.n_trained + result.n_held_out + result.n_left
    if accounted != result.n_in:
        raise LogError(
            f"{result.n_in} tokens in, but {result.n_trained} trained + {result.n_held_out} held out "
            f"+ {result.n_left} left = {accounted}",
            where=", ".join(str(source.log.path) for source in feed.sources),
            why="the logs or their pack indexes are not what the feed was made of",
            fix=f"delete {feed.sources[0].folder.parent}, which is made again, and verify the logs",
        )
