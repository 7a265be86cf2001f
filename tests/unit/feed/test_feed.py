import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydist.corpus.log import held_out
from raydist.errors import EmptyCorpus, JobError, LogError
from raydist.feed import Feed, FeedSource
from raydist.feed.cache import cached_array, pack_index_folder
from raydist.job.schema import Packing
from tests.unit.feed.places import places_of

SHARDS = [[5, 40, 1, 16, 15, 17, 3], [100, 2, 2], [7] * 30, [16]]
BOS = 2**20 - 1  # no token of these logs
STRATEGIES = pytest.mark.parametrize("strategy", ["best_fit", "concat"])


def packing(**options) -> Packing:
    return Packing(**{"block_size": 16, "window_shards": 2, **options})


def kept_documents(log, holdout: float) -> list[np.ndarray]:
    hashes = np.concatenate([shard.hashes() for shard in log.shards])
    out = held_out(hashes, holdout)
    return [row["input_ids"] for row, gone in zip(log.documents(), out, strict=True) if not gone]


def following(documents: list[np.ndarray], eos: bool) -> dict[int, int]:
    """The token after each; tokens of these logs are all different. 0 is EOS."""
    return {
        int(a): int(b) for ids in documents for a, b in zip(ids, [*ids[1:], 0 if eos else -100], strict=True)
    }


def check_epoch(feed: Feed, documents: list[np.ndarray], samples: np.ndarray) -> None:
    eos = feed.packing.add_eos_token
    after = following(documents, eos)
    document_of = {int(token): number for number, ids in enumerate(documents) for token in ids}
    seen: Counter[int] = Counter()
    begun: Counter[int] = Counter()
    n_eos = 0
    for g in samples:
        block = feed.block(int(g))
        n_tokens, added, n_padding, n_labels, n_bos = feed.counts(int(g), int(g) + 1)
        filled = feed.packing.block_size - n_padding
        ids, labels, positions = block["input_ids"], block["labels"], block["position_ids"]
        assert (ids[filled:] == 0).all()
        assert (labels[filled:] == -100).all()
        assert np.count_nonzero(labels != -100) == n_labels
        assert np.count_nonzero(ids[:filled]) == n_tokens + n_bos
        assert np.count_nonzero(ids == BOS) == n_bos
        assert np.count_nonzero(ids[:filled] == 0) == added
        first = ids == BOS
        begun.update(labels[first].tolist())
        whole = first[:-1] & (np.diff(positions) == 1) & feed.packing.document_mask
        assert (labels[:-1][whole] == ids[1:][whole]).all()
        rest = ~first[:filled]
        tokens = ids[:filled][rest].tolist()
        assert labels[:filled][rest].tolist() == [after[token] if token else -100 for token in tokens]
        if feed.bos is None:
            check_positions(feed, ids[:filled].tolist(), positions.tolist(), document_of)
        else:
            assert not feed.packing.document_mask or not positions[first].any()
        assert block["document_lengths"].tolist() == lengths_where_positions_restart(positions)
        seen.update(token for token in tokens if token)
        n_eos += added
    assert seen == Counter(document_of.keys())
    assert n_eos == len(documents) * eos
    assert begun == Counter(int(ids[0]) for ids in documents if feed.bos is not None)


def lengths_where_positions_restart(positions: np.ndarray) -> list[int]:
    """Of one row, filled up with zeros: a document is where positions go up by one."""
    starts = np.flatnonzero(np.diff(positions, prepend=positions[0]) != 1)
    lengths = np.diff(starts, append=len(positions)).tolist()
    return lengths + [0] * (len(positions) - len(lengths))


def check_positions(feed: Feed, ids: list[int], positions: list[int], document_of: dict[int, int]) -> None:
    if not feed.packing.document_mask:
        assert positions == list(range(feed.packing.block_size))
        return
    expected, previous = [], None
    for at, token in enumerate(ids):
        same = at > 0 and ids[at - 1] != 0 and (token == 0 or document_of[token] == previous)
        expected.append(expected[-1] + 1 if same else 0)
        previous = document_of[token] if token else previous
    assert positions == expected + list(range(feed.packing.block_size - len(ids)))


@STRATEGIES
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bos", [None, BOS])
def test_an_epoch_is_every_kept_token_once_with_its_label_and_position(make_log, strategy, eos, mask, bos):
    log = make_log(SHARDS)
    packed = packing(strategy=strategy, add_eos_token=eos, document_mask=mask)
    feed = Feed([FeedSource("a", log)], packed, 3, 0.1, bos=bos)
    documents = kept_documents(log, 0.1)
    assert 0 < len(documents) < log.n_documents
    for epoch in range(2):
        check_epoch(feed, documents, np.arange(feed.samples_per_epoch) + epoch * feed.samples_per_epoch)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=5),
    st.sampled_from(["best_fit", "concat"]),
    st.booleans(),
    st.integers(8, 40),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, BOS]),
)
def test_no_token_is_lost_or_doubled_and_documents_are_where_positions_restart(
    make_log, shards, strategy, eos, block_size, window_shards, document_mask, bos
):
    log = make_log(shards, name=f"log{abs(hash(str(shards)))}")
    options = {
        "strategy": strategy,
        "add_eos_token": eos,
        "block_size": block_size,
        "window_shards": window_shards,
        "document_mask": document_mask,
    }
    feed = Feed([FeedSource("a", log)], packing(**options), 0, 0.0, bos=bos)
    check_epoch(feed, kept_documents(log, 0.0), np.arange(feed.samples_per_epoch))


def test_without_bos_the_feed_is_that_of_older_versions(make_log):
    """By its fingerprint, which checkpoints hold, and by the folder of its pack indexes."""
    log = make_log(SHARDS)
    plain = Feed([FeedSource("a", log)], packing(), 3, 0.1)
    assert plain.fingerprint == "d73d58467632c647ef622ad9a9b3eff3"
    assert plain.sources[0].folder.name.rpartition("-")[2] == "2303dabb370aa4e9"
    assert Feed([FeedSource("a", log)], packing(add_bos_token=False), 3, 0.1).fingerprint == plain.fingerprint
    with_bos = Feed([FeedSource("a", log)], packing(), 3, 0.1, bos=BOS)
    assert with_bos.fingerprint != plain.fingerprint
    assert with_bos.sources[0].folder != plain.sources[0].folder
    assert pickle.loads(pickle.dumps(with_bos)).fingerprint == with_bos.fingerprint


def test_sources_without_weights_are_one_mixed_stream(make_log):
    logs = [make_log([[20] * 9] * n, name=name) for n, name in [(9, "a"), (3, "b")]]
    feed = Feed([FeedSource(log.path.name, log) for log in logs], packing(window_shards=1), 0, 0.0)
    places = places_of(feed, range(feed.samples_per_epoch))
    assert len(set(places)) == len(places) == sum(source.n_blocks for source in feed.sources)
    shards = [place[:2] for place, nearby in pairwise([*places, (-1, -1, -1)]) if place[:2] != nearby[:2]]
    assert [source for source, _ in shards] == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    for source in range(2):
        assert [shard for of, shard in shards if of == source] == list(range(len(logs[source].shards)))


def test_a_weighted_mixture_keeps_its_shares_and_reads_each_source_in_its_own_order(make_log):
    logs = [make_log([[20] * 9] * 3, name=name) for name in "ab"]
    feed = Feed([FeedSource("a", logs[0], 0.75), FeedSource("b", logs[1], 0.25)], packing(), 0, 0.0)
    assert feed.samples_per_epoch is None
    places = places_of(feed, range(400))
    assert Counter(place.source for place in places) == {0: 300, 1: 100}
    epoch = feed.sources[1].n_blocks
    from_b = [place for place in places if place.source == 1]
    assert len(set(from_b[:epoch])) == epoch
    alone = places_of(Feed([FeedSource("b", logs[1], 1.0)], packing(), 0, 0.0), range(100))
    assert [place[1:3] for place in from_b] == [place[1:3] for place in alone]


def test_a_block_is_a_function_of_its_number_alone(make_log):
    source = [FeedSource("a", make_log(SHARDS))]
    feed, again = Feed(source, packing(), 1, 0.1), Feed(source, packing(), 1, 0.1)
    for g in (40, 3, 1003, 0):
        one, batch = feed.block(g), again.batch([g, -1, 7])
        assert one["sample"] == g == batch["sample"][0]
        for name in ("input_ids", "labels", "position_ids", "document_lengths"):
            assert np.array_equal(one[name], batch[name][0])
            assert one[name].dtype == (np.int32 if name == "document_lengths" else np.int64)


def test_padding_samples_have_no_labels(make_log):
    batch = Feed([FeedSource("a", make_log(SHARDS))], packing(), 0, 0.0).batch([-1, -1])
    assert (batch["labels"] == -100).all()
    assert batch["sample"].tolist() == [-1, -1]
    assert batch["position_ids"][0].tolist() == list(range(16))
    assert batch["document_lengths"].tolist() == [[16] + [0] * 15] * 2


def test_the_seed_changes_the_order_and_nothing_else(make_log):
    source = [FeedSource("a", make_log(SHARDS))]
    one, other = (Feed(source, packing(), seed, 0.0) for seed in (0, 1))
    n = one.samples_per_epoch
    assert places_of(one, range(n)) != places_of(other, range(n))
    assert set(places_of(one, range(n))) == set(places_of(other, range(n)))


def test_counts_of_a_range_are_the_sum_of_its_samples(make_log):
    logs = [make_log(SHARDS, name=name) for name in "ab"]
    for weights in ([None, None], [0.6, 0.4]):
        sources = [FeedSource(log.path.name, log, weight) for log, weight in zip(logs, weights, strict=True)]
        feed = Feed(sources, packing(), 0, 0.1)
        each = feed.stages[0].read(np.arange(200))[1]
        for start, stop in [(0, 200), (3, 3), (17, 18), (11, 157), (50, 51)]:
            assert list(feed.counts(start, stop)) == each[start:stop].sum(axis=0).tolist()


def test_the_fingerprint_is_of_all_that_decides_a_sample(make_log):
    logs = [make_log(SHARDS, name=name) for name in "ab"]

    def of(weights=(0.5, 0.5), seed=0, holdout=0.0, order=(0, 1), **options):
        sources = [FeedSource(f"{at}", logs[at], weight) for at, weight in zip(order, weights, strict=True)]
        return Feed(sources, packing(**options), seed, holdout).fingerprint

    variants = [
        {"weights": (0.4, 0.6)},
        {"weights": (None, None)},
        {"seed": 1},
        {"holdout": 0.1},
        {"block_size": 32},
        {"document_mask": False},
        {"window_shards": 1},
    ]
    assert of() == of()
    assert len({of(), *(of(**variant) for variant in variants)}) == 1 + len(variants)


def test_nothing_left_to_train_on_is_refused(make_log):
    log = make_log([[5]])
    hashes = log.shards[0].hashes()
    with pytest.raises(EmptyCorpus, match="of a is left"):
        Feed([FeedSource("a", log)], packing(), 0, float(hashes[0]) / 2**64 + 1e-6)
    with pytest.raises(EmptyCorpus):
        Feed([FeedSource("a", make_log([], name="none"))], packing(), 0, 0.0)


def test_logs_that_do_not_fit_are_refused(make_log):
    with pytest.raises(LogError, match="different tokenizers"):
        Feed(
            [FeedSource("a", make_log([[5]])), FeedSource("b", make_log([[5]], name="b", vocab=500))],
            packing(),
            0,
            0,
        )
    no_eos = make_log([[5]], name="c", eos=None)
    with pytest.raises(LogError, match="end-of-sequence"):
        Feed([FeedSource("c", no_eos)], packing(), 0, 0.0)
    assert (
        Feed([FeedSource("c", no_eos)], packing(add_eos_token=False), 0, 0.0).block(0)["input_ids"][5:].sum()
        == 0
    )
    with pytest.raises(JobError):
        Feed(
            [FeedSource("a", make_log([[5]]), 1.0), FeedSource("b", make_log([[5]]), 1e-9)], packing(), 0, 0.0
        )


def test_who_asks_hears_of_each_shard_that_is_packed(make_log):
    source, packed = [FeedSource("a", make_log(SHARDS))], list[int]()
    for _ in range(2):  # the second time it is packed already
        Feed(source, packing(), 0, 0.1, on_packed=lambda: packed.append(1))
        assert len(packed) == len(SHARDS)


def test_opening_again_reads_the_totals_alone_and_a_lost_index_is_made_again(make_log):
    log = make_log(SHARDS)
    source = [FeedSource("a", log)]
    feed = Feed(source, packing(), 0, 0.1)
    expected = feed.batch(np.arange(20))
    for index in pack_index_folder(log).rglob("*.pack"):
        index.unlink()
    again = Feed(source, packing(), 0, 0.1)
    assert not list(pack_index_folder(log).rglob("*.pack"))
    assert np.array_equal(again.batch(np.arange(20))["labels"], expected["labels"])
    assert list(pack_index_folder(log).rglob("*.pack"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-8], lambda b: b[:-3], lambda b: b"", lambda b: b[:80] + b"\xff" + b[81:]]
)
def test_a_damaged_pack_file_is_made_again(make_log, damage):
    log = make_log(SHARDS)
    source = [FeedSource("a", log)]
    expected = Feed(source, packing(), 0, 0.1).batch(np.arange(20))
    whole = {path: path.read_bytes() for path in pack_index_folder(log).rglob("*") if path.is_file()}
    assert len(whole) == 1 + len(SHARDS)
    for path, content in whole.items():
        path.write_bytes(damage(content))
    assert np.array_equal(
        Feed(source, packing(), 0, 0.1).batch(np.arange(20))["input_ids"], expected["input_ids"]
    )
    assert {path: path.read_bytes() for path in whole} == whole


def test_the_log_folder_is_not_touched(make_log):
    log = make_log(SHARDS)
    before = sorted(log.path.parent.rglob("*"))
    Feed([FeedSource("a", log)], packing(), 0, 0.1).block(0)
    assert sorted(log.path.parent.rglob("*")) == before


def test_storage_that_cannot_be_written_is_no_obstacle(tmp_path):
    refused = Path("/sys/raydist/pack")  # refused to root as well
    assert cached_array(refused, lambda: np.arange(3)).tolist() == [0, 1, 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        cached_array(tmp_path / "file" / "pack", lambda: np.arange(3))


def test_a_feed_travels_to_other_processes(make_log):
    feed = Feed([FeedSource("a", make_log(SHARDS))], packing(), 0, 0.1)
    there = pickle.loads(pickle.dumps(feed))
    assert there.fingerprint == feed.fingerprint
    assert np.array_equal(there.batch([5])["input_ids"], feed.batch([5])["input_ids"])


def test_the_feed_needs_no_torch_and_no_ray():
    code = (
        "import sys, raydist.feed; sys.exit(any(n in sys.modules for n in ('torch', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
