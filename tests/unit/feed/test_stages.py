"""Stages: whatever was read of the windows that were open, the next block size reads the rest, once."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydist.corpus.log import held_out
from raydist.feed import Feed, FeedSource, audit
from raydist.job.plan import Stretch
from raydist.job.schema import Packing
from tests.unit.feed.places import places_of

SHARDS = [[5, 40, 1, 16, 15, 17, 3], [100, 2, 2], [7] * 30, [16], [33, 9, 70]]
ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.tuples(st.sampled_from([8, 16, 24, 40]), st.integers(1, 25)), min_size=1, max_size=4)


def build(make_log, stages, weights=(None, None), strategy="best_fit", holdout=0.1) -> Feed:
    """Of two logs whose tokens are all different, also between the two."""
    sources = [
        FeedSource(name, make_log(SHARDS, name=name), weight)
        for name, weight in zip("ab", weights, strict=True)
    ]
    packing = Packing(block_size=16, window_shards=2, strategy=strategy)
    return Feed(sources, packing, 0, holdout, stretches=[Stretch(*stage) for stage in stages])


def tokens_of(feed: Feed, start: int, stop: int) -> list[Counter[int]]:
    """By source: how often each token was an input of samples [start, stop)."""
    seen: list[Counter[int]] = [Counter() for _ in feed.sources]
    for g in range(start, stop):
        (place,) = places_of(feed, [g])
        ids = feed.block(g)["input_ids"]
        seen[place.source].update(ids[ids > 0].tolist())
    return seen


def to_train(feed: Feed) -> list[set[int]]:
    found = []
    for source in feed.sources:
        hashes = np.concatenate([shard.hashes() for shard in source.log.shards])
        kept = ~held_out(hashes, feed.holdout)
        rows = zip(source.log.documents(), kept, strict=True)
        found.append({int(t) for row, keep in rows if keep for t in row["input_ids"]})
    return found


def samples_in_last(feed: Feed) -> int:
    """Samples from the last stage's start to the end of the epoch that it began in."""
    (stream,) = feed.stages[-1].streams
    epoch, window = stream.begins
    return stream.n_head + (stream.n_blocks - stream.window_start(window) if epoch == 0 else 0)


@ANY
@given(LENGTHS, st.sampled_from(["best_fit", "concat"]))
def test_an_epoch_over_stages_is_every_token_once(make_log, stages, strategy):
    feed = build(make_log, [*stages, (16, 1)], strategy=strategy)
    if feed.stages[-1].streams[0].begins[0] > 0:
        return  # the stages are longer than an epoch: see the next test
    end = feed.stages[-1].start + samples_in_last(feed)
    for seen, wanted in zip(tokens_of(feed, 0, end), to_train(feed), strict=True):
        assert seen == Counter(wanted)
    result = audit(feed, end)
    assert (result.n_left, result.n_repeated) == (0, 0)


@ANY
@given(LENGTHS, st.integers(0, 120), st.sampled_from([(None, None), (0.7, 0.3)]))
def test_the_audit_counts_what_the_samples_hold(make_log, stages, n_samples, weights):
    feed = build(make_log, stages, weights)
    result, seen = audit(feed, n_samples), tokens_of(feed, 0, n_samples)
    assert result.n_trained == sum(len(of) for of in seen)
    assert result.n_repeated == sum(of.total() for of in seen) - result.n_trained
    assert result.n_left == sum(len(of) for of in to_train(feed)) - result.n_trained
    assert result.n_in == result.n_trained + result.n_held_out + result.n_left


@pytest.mark.parametrize("weights", [(None, None), (0.7, 0.3)])
def test_labels_are_the_next_token_of_the_document_also_of_what_was_left(make_log, weights):
    feed = build(make_log, [(24, 7), (8, 9), (16, 3), (40, 1)], weights, holdout=0.0)
    after = []
    for source in feed.sources:
        rows = [row["input_ids"].tolist() for row in source.log.documents()]
        after.append({a: b for ids in rows for a, b in zip(ids, [*ids[1:], 0], strict=True)})
    for g in range(60):
        (place,) = places_of(feed, [g])
        block, counts = feed.block(g), feed.counts(g, g + 1)
        ids, labels = block["input_ids"], block["labels"]
        assert len(ids) == feed.stages[feed.stage_number(g)].packing.block_size == sum(counts[:3])
        for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
            assert label == (after[place.source][token] if token else -100)
        assert np.count_nonzero(labels != -100) == counts.n_labels


def test_steps_change_their_block_size_with_the_stage_and_never_mix_two(make_log):
    feed = build(make_log, [(8, 12), (16, 10), (24, 1)])
    steps = feed.loader(1, 2, 6, 26, global_batch_size=[6, 4, 4], micro_batch_size=[3, 2, 1])
    found = [
        (step.start, step.stop, [tuple(m["input_ids"].shape) for m in step.micro_batches]) for step in steps
    ]
    assert found == [
        (6, 12, [(3, 8)]),
        (12, 16, [(2, 16)]),
        (16, 20, [(2, 16)]),
        (20, 22, [(1, 16)]),
        (22, 26, [(1, 24), (1, 24)]),
    ]
    with pytest.raises(ValueError, match=r"several stages.*\[0, 12, 22\]"):
        feed.batch([11, 12])


def test_a_feed_with_stages_is_one_of_its_own_and_can_be_sent(make_log):
    feed, other = build(make_log, [(8, 12), (16, 1)]), build(make_log, [(8, 13), (16, 1)])
    assert len({feed.fingerprint, other.fingerprint, build(make_log, []).fingerprint}) == 3
    again = pickle.loads(pickle.dumps(feed))
    assert again.fingerprint == feed.fingerprint
    assert np.array_equal(again.block(20)["input_ids"], feed.block(20)["input_ids"])


@settings(ANY, max_examples=15)
@given(LENGTHS, st.integers(0, 120), st.sampled_from(["best_fit", "concat"]))
def test_documents_begin_with_bos_in_every_stage_and_are_accounted_for(make_log, stages, n_samples, strategy):
    bos = 2**20 - 1  # no token of these logs
    logs = [FeedSource(name, make_log(SHARDS, name=name)) for name in "ab"]
    packing = Packing(block_size=16, window_shards=2, strategy=strategy)
    lengths = [Stretch(*stage) for stage in stages]
    feed = Feed(logs, packing, 0, 0.1, stretches=lengths, bos=bos)
    labels, n_bos = Counter(), 0
    for g in range(n_samples):
        block = feed.block(g)
        labels.update(block["labels"][block["input_ids"] == bos].tolist())
        n_bos += int(np.count_nonzero(block["input_ids"] == bos))
    firsts = [{int(row["input_ids"][0]) for row in source.log.documents()} for source in feed.sources]
    result, seen = audit(feed, n_samples), tokens_of(feed, 0, n_samples)
    assert labels.keys() <= set.union(*firsts) and n_bos == result.n_bos == labels.total()
    for of in seen:
        del of[bos]
    assert result.n_trained == sum(len(of) for of in seen)
    assert result.n_repeated == sum(of.total() for of in seen) - result.n_trained
    if result.n_left == 0 == result.n_repeated:
        assert labels == Counter({t: 1 for of in to_train(feed) for t in of if t in set.union(*firsts)})
