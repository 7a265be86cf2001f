"""A run whose sources and weights change: every stream goes on where it was, and new ones begin."""

import pickle
from collections import Counter

import pytest

from raydist.feed import Feed, FeedSource, audit
from raydist.feed.loader import Step
from raydist.job.plan import Mix
from raydist.job.schema import Packing
from tests.unit.feed.places import places_of
from tests.unit.feed.test_stages import SHARDS, to_train, tokens_of

FIRST = Mix(0, {"a": 0.7, "b": 0.3})
SECOND = Mix(50, {"a": 0.2, "b": 0.3, "c": 0.5})
THIRD = Mix(90, {"a": 0.4, "b": 0.3, "c": 0.3})


def build(make_log, *mixes: Mix, holdout: float = 0.1, dedup: bool = False) -> Feed:
    """Of logs whose tokens are all different within a log."""
    sources = [
        FeedSource(name, make_log(SHARDS, name=name), weight) for name, weight in mixes[-1].weights.items()
    ]
    packing = Packing(block_size=16, window_shards=2)
    return Feed(sources, packing, 0, holdout, mixes=mixes if len(mixes) > 1 else (), dedup=dedup)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (13, 40), (90, 7)])
@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0}, {"a": None}])
def test_every_source_gives_each_token_once_before_it_gives_one_twice(make_log, first, second, weights):
    """Nothing is lost or read again: of windows that were open, of the others, of new sources."""
    changes = Mix(first, SECOND.weights), Mix(first + second, THIRD.weights)
    feed = build(make_log, Mix(0, weights), *changes)
    wanted = [Counter(tokens) for tokens in to_train(feed)]
    seen = [Counter[int]() for _ in wanted]
    for g in range(240):
        (place,) = places_of(feed, [g])
        times = seen[place.source]
        times += tokens_of(feed, g, g + 1)[place.source]
        assert max(times.values()) <= 1 + min(times[token] for token in wanted[place.source])
    assert all(times.keys() == once.keys() for times, once in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("n_samples", [0, 1, 50, 51, 77, 90, 160])
def test_the_audit_counts_what_the_samples_hold(make_log, n_samples):
    feed = build(make_log, FIRST, SECOND, THIRD)
    result, seen = audit(feed, n_samples), tokens_of(feed, 0, n_samples)
    assert result.n_trained == sum(len(of) for of in seen)
    assert result.n_repeated == sum(of.total() for of in seen) - result.n_trained
    assert result.n_left == sum(len(of) for of in to_train(feed)) - result.n_trained
    assert result.n_in == sum(source.log.n_tokens for source in feed.sources)
    assert result.n_in == result.n_trained + result.n_held_out + result.n_left


def test_samples_before_a_change_are_those_of_the_run_without_it(make_log):
    alone, feed = build(make_log, FIRST), build(make_log, FIRST, SECOND, THIRD)
    assert alone.batch(range(50))["input_ids"].tolist() == feed.batch(range(50))["input_ids"].tolist()
    assert alone.counts(3, 50) == feed.counts(3, 50)
    last = [feed.sources[place.source].name for place in places_of(feed, range(90, 190))]
    assert Counter(last) == {"a": 40, "b": 30, "c": 30}


def test_a_position_knows_the_mixes_that_it_has_reached_and_no_later_ones(make_log):
    one, two, three = (
        build(make_log, *mixes) for mixes in ([FIRST], [FIRST, SECOND], [FIRST, SECOND, THIRD])
    )
    assert one.fingerprint == two.fingerprint_at(50) == three.fingerprint_at(1) == three.fingerprint_at(50)
    assert two.fingerprint == three.fingerprint_at(51) == three.fingerprint_at(90)
    assert three.fingerprint == three.fingerprint_at(91)
    moved = build(make_log, FIRST, SECOND._replace(start=60))
    assert len({one.fingerprint, two.fingerprint, three.fingerprint, moved.fingerprint}) == 4


def test_the_fingerprint_of_a_run_that_does_not_change_is_the_one_that_checkpoints_have(make_log):
    assert build(make_log, FIRST).fingerprint == "59309c8d3acc1e0f0522e94b78c8e941"


def rows_of(*steps: Step) -> dict[int, list[int]]:
    batches = [batch for step in steps for batch in step.micro_batches]
    return {
        int(g): ids.tolist()
        for batch in batches
        for g, ids in zip(batch["sample"], batch["input_ids"], strict=True)
    }


def test_steps_never_mix_two_mixtures_and_two_ranks_read_what_one_does(make_log):
    feed = build(make_log, FIRST, Mix(48, SECOND.weights))
    alone = list(feed.loader(0, 1, 40, 64, global_batch_size=8, micro_batch_size=8))
    both = [list(feed.loader(rank, 2, 40, 64, global_batch_size=8, micro_batch_size=8)) for rank in (0, 1)]
    assert [(step.start, step.stop) for step in alone] == [(40, 48), (48, 56), (56, 64)]
    for step, *parts in zip(alone, *both, strict=True):
        assert rows_of(*parts) == rows_of(step)


def test_it_can_be_sent(make_log):
    feed = build(make_log, FIRST, SECOND)
    again = pickle.loads(pickle.dumps(feed))
    assert again.fingerprint == feed.fingerprint
    assert again.block(70)["input_ids"].tolist() == feed.block(70)["input_ids"].tolist()
    with pytest.raises(ValueError, match=r"several stages.*\[0, 50\]"):
        feed.batch([49, 50])
