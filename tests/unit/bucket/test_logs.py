"""Token logs in a bucket: what one node writes another opens, reads shard by shard, and checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raydist.bucket import mirror
from raydist.corpus.log import open_log
from raydist.corpus.log_folder import LogFolder
from raydist.errors import LogError
from raydist.feed.feed import Feed
from raydist.feed.pack_index import FeedSource
from raydist.job.schema import Packing
from raydist.training.shard_check import ShardCheck
from tests.poison import Part, write_poisoned
from tests.unit.bucket.test_mirror import other_node


@pytest.fixture
def path(storage: Path) -> Path:
    """A token log of six shards."""
    path = storage / "tokens" / "log"
    write_poisoned(path, [Part(30)] * 6)
    return path


def feed_of(path: Path) -> Feed:
    source = FeedSource("words", open_log(path))
    return Feed([source], Packing(block_size=16, window_shards=2, add_eos_token=False), 0, 0.0)


def here(path: Path) -> int:
    """How many shards this node has."""
    return len(list((path / "shards").glob("*.arrow")))


def test_another_node_has_only_what_it_reads(path: Path) -> None:
    there = other_node(path)
    ours, log = feed_of(path), open_log(there)
    assert log.n_documents == 180 and here(there) == 0
    assert log.shards[4].lengths().tolist() == ours.sources[0].log.shards[4].lengths().tolist()
    assert here(there) == 1


def test_packs_are_made_once_for_all_nodes(path: Path) -> None:
    there = other_node(path)
    ours = feed_of(path)
    wanted = ours.batch(np.arange(8))
    theirs = feed_of(there)
    assert here(there) == 0, "the numbers of blocks come from the bucket"
    found = theirs.batch(np.arange(8))
    assert all((found[name] == wanted[name]).all() for name in wanted) and 0 < here(there) <= 2
    assert theirs.fingerprint == ours.fingerprint


def test_the_next_window_is_fetched_ahead(path: Path) -> None:
    there = other_node(path)
    feed_of(path)
    theirs = feed_of(there)
    (stage,) = theirs.stages
    first, second = stage.shards_read(0, 1), stage.shards_after(1)
    assert {s.name for s in first}.isdisjoint(s.name for s in second) and len(second) == 2
    check = ShardCheck()
    check.want_next(second)
    for coming in check._coming.values():
        coming.result(30)
    check.close()
    assert {path.name for path in (there / "shards").glob("*.arrow")} == {s.name for s in second}


def test_a_shard_that_is_damaged_or_gone_in_the_bucket_is_named(path: Path) -> None:
    there = other_node(path)
    shards = open_log(there).shards
    damaged = path / "shards" / shards[1].name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    mirror.publish(damaged)
    with pytest.raises(LogError, match=f"{shards[1].name} of the token log is damaged"):
        shards[1].verify()
    mirror.remove(path / "shards" / shards[2].name)
    with pytest.raises(LogError, match=shards[2].name):
        shards[2].verify()
    with pytest.raises(LogError, match=f"missing or torn: {shards[2].name}"):
        open_log(there)


def test_a_log_without_its_manifest_is_incomplete_on_every_node(path: Path) -> None:
    there = LogFolder(other_node(path))
    assert there.complete()
    mirror.remove(path / "manifest.json")
    assert not there.complete() and not there.manifest_file.exists()
    assert there.committed() == [*range(6)]
