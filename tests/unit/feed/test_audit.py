import numpy as np
import pytest

from raydist.errors import LogError
from raydist.feed import Feed, FeedSource, audit
from raydist.feed.cache import _checksum
from raydist.job.schema import Packing
from tests.unit.feed.places import places_of

SHARDS = [[20, 7, 33, 5] * 4] * 5


def build(make_log, weights, strategy="best_fit", holdout=0.1) -> Feed:
    sources = [
        FeedSource(name, make_log(SHARDS, name=name), weight)
        for name, weight in zip("ab", weights, strict=True)
    ]
    return Feed(sources, Packing(block_size=16, window_shards=2, strategy=strategy), 0, holdout)


def by_hand(feed: Feed, n_samples: int) -> dict[str, int]:
    """From the samples themselves: how often was each (log, token) an input?"""
    times = [np.zeros(source.log.n_tokens + 1, np.int64) for source in feed.sources]
    eos = padding = 0
    for g in range(n_samples):
        counts = feed.counts(g, g + 1)
        ids = feed.block(g)["input_ids"]
        eos, padding = eos + counts.n_eos, padding + counts.n_padding
        (place,) = places_of(feed, [g])
        np.add.at(times[place.source], ids[ids > 0], 1)  # tokens of these logs count up from 1
    seen = sum(int(np.count_nonzero(of[1:])) for of in times)
    return {
        "n_trained": seen,
        "n_repeated": sum(int(of.sum()) for of in times) - seen,
        "n_eos": eos,
        "n_padding": padding,
    }


@pytest.mark.parametrize("strategy", ["best_fit", "concat"])
@pytest.mark.parametrize("weights", [(None, None), (0.7, 0.3)])
@pytest.mark.parametrize("n_samples", [0, 1, 37, 150, 700])
def test_every_token_is_trained_held_out_or_left(make_log, weights, strategy, n_samples):
    feed = build(make_log, weights, strategy)
    result = audit(feed, n_samples)
    assert result.n_in == sum(source.log.n_tokens for source in feed.sources)
    assert result.n_in == result.n_trained + result.n_held_out + result.n_left
    assert result.n_held_out > 0
    expected = by_hand(feed, n_samples)
    assert {name: getattr(result, name) for name in expected} == expected


def test_an_epoch_leaves_nothing_and_a_second_repeats_all(make_log):
    feed = build(make_log, (None, None))
    n = feed.samples_per_epoch
    once, twice = audit(feed, n), audit(feed, 2 * n)
    assert (once.n_left, once.n_repeated) == (0, 0)
    assert (twice.n_left, twice.n_repeated) == (0, once.n_trained)
    assert audit(feed, n - 1).n_left > 0


def test_numbers_that_do_not_add_up_are_an_error(make_log):
    feed = build(make_log, (None, None))
    totals = feed.sources[0].folder / "counts"
    rows = np.fromfile(totals, np.int64)[1:].copy()
    rows[6] += 1  # one more held-out token than there is
    np.concatenate([_checksum(rows), rows]).tofile(totals)
    with pytest.raises(LogError, match="tokens in, but"):
        audit(build(make_log, (None, None)), 10)
