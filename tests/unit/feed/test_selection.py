import numpy as np
import pytest

from raydist.corpus.log import held_out
from raydist.errors import EmptyCorpus
from raydist.feed import EvalSet, Feed, FeedSource, audit, selection
from raydist.feed.cache import pack_index_folder
from raydist.job.schema import Packing

PACKING = Packing(block_size=16, window_shards=2)
FIRST = [["a", "b", "a"], ["c"], ["b", "d", "a", "e"]]
SECOND = [["d", "f"], ["f", "g", "c"]]


@pytest.fixture
def logs(make_log):
    return [make_log([[9] * len(s) for s in FIRST], name="x", texts=FIRST),
            make_log([[9] * len(s) for s in SECOND], name="y", texts=SECOND)]  # fmt: skip


def test_the_first_of_equal_texts_stays_in_whatever_source(logs, monkeypatch):
    expected = [[2, 4, 6], [0, 2, 4]]
    assert [rows.tolist() for rows in selection.duplicates(logs)] == expected
    assert [rows.tolist() for rows in selection.duplicates(logs[::-1])] == [[2], [2, 3, 4, 5, 6]]
    assert selection.unique_share(logs) == pytest.approx(7 / 13)
    monkeypatch.setattr(selection, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(selection, "cached_array", lambda path, make: make())
    assert [rows.tolist() for rows in selection.duplicates(logs)] == expected
    assert 0 < selection.unique_share(logs) <= 1  # of those in the first range of hashes


def test_dropped_documents_are_in_no_block_and_are_accounted_for(logs):
    sources = [FeedSource(name, log) for name, log in zip("xy", logs, strict=True)]
    plain, feed = Feed(sources, PACKING, 0, 0.2), Feed(sources, PACKING, 0, 0.2, dedup=True)
    assert feed.fingerprint != plain.fingerprint and plain.sources[0].duplicate_documents == 0
    n = feed.samples_per_epoch
    result = audit(feed, n)
    out = [held_out(np.concatenate([s.hashes() for s in log.shards]), 0.2) for log in logs]
    dropped = sum(int((~of[rows]).sum()) for of, rows in zip(out, selection.duplicates(logs), strict=True))
    assert dropped > 0
    assert result.n_duplicate == 9 * dropped == 9 * sum(s.duplicate_documents for s in feed.sources)
    assert (result.n_left, result.n_repeated) == (0, 0)
    assert result.n_in == result.n_trained + result.n_held_out + result.n_duplicate
    assert result.n_trained == feed.counts(0, n).n_tokens < plain.counts(0, plain.samples_per_epoch).n_tokens


def test_held_out_texts_are_evaluated_once(logs):
    many = EvalSet("x", logs[0], PACKING, holdout=None, max_tokens=1e6)
    once = EvalSet("x", logs[0], PACKING, holdout=None, max_tokens=1e6, unique=True)
    assert (many.n_documents, once.n_documents) == (8, 5)


def test_a_source_of_nothing_new_is_refused_when_it_has_a_weight(make_log):
    one, two = (make_log([[9, 9]], name=name, texts=[["a", "b"]]) for name in "xy")
    sources = [FeedSource("x", one, 0.5), FeedSource("y", two, 0.5)]
    with pytest.raises(EmptyCorpus, match="no document of y is left"):
        Feed(sources, PACKING, 0, 0.0, dedup=True)


@pytest.mark.parametrize(
    ("dedup", "packing", "fingerprint"),
    [
        (False, "53c04b354f9a84da", "1dca55a78007e268d62f0e83616de6c5"),
        (True, "75fb0ef649ec4392", "9b6aaf29719fad8560131257aeb8bafe"),
    ],
)
def test_names_on_disk_and_fingerprints_stay_what_they_are(logs, dedup, packing, fingerprint):
    """An index that exists is used again, and a checkpoint goes on only with a feed of its fingerprint."""
    sources = [FeedSource(name, log) for name, log in zip("xy", logs, strict=True)]
    feed = Feed(sources, PACKING, 0, 0.2, dedup=dedup)
    assert feed.fingerprint == fingerprint
    names = {f"{log.fingerprint}-{packing}" for log in logs} | (
        {"53d0cd328b76316d-duplicates"} if dedup else set()
    )
    assert {path.name for path in pack_index_folder(logs[0]).iterdir()} == names


def test_a_selection_names_the_documents_that_are_left_out(logs):
    kept, dropped = (selection.select(logs, 0.2, dedup=dedup) for dedup in (False, True))
    for log, plain, unique, rows in zip(logs, kept, dropped, selection.duplicates(logs), strict=True):
        shards = range(len(log.shards))
        assert not any(plain.repeated(shard).any() for shard in shards)
        assert (
            np.flatnonzero(np.concatenate([unique.repeated(shard) for shard in shards])).tolist()
            == rows.tolist()
        )
        for shard in shards:
            out = held_out(log.shards[shard].hashes(), 0.2)
            assert (plain.held_out(shard) == out).all() and (unique.held_out(shard) == out).all()
