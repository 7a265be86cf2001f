import gc
import itertools
import threading

import pytest
import torch

from raydist.errors import LogError
from raydist.feed import Feed, FeedSource
from raydist.feed.loader import global_batches
from raydist.job.schema import Packing

SHARDS = [[20, 7, 33, 5] * 4] * 3
COLUMNS = ("input_ids", "labels", "position_ids", "document_lengths")


@pytest.fixture
def feed(make_log) -> Feed:
    return Feed([FeedSource("a", make_log(SHARDS))], Packing(block_size=16, window_shards=2), 0, 0.05)


def all_ranks(feed, world_size, micro_batch_size, start=0, stop=45, batch=10):
    """Each step of all ranks together."""
    sizes = {"global_batch_size": batch, "micro_batch_size": micro_batch_size}
    ranks = [feed.loader(rank, world_size, start, stop, **sizes) for rank in range(world_size)]
    return list(zip(*ranks, strict=True))


def rows(steps) -> dict[int, tuple]:
    """Real samples of one global batch: number -> content."""
    return {
        int(number): tuple(batch[name][row].tolist() for name in COLUMNS)
        for step in steps
        for batch in step.micro_batches
        for row, number in enumerate(batch["sample"])
        if number >= 0
    }


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"), [(1, 10), (2, 3), (3, 1), (3, 4), (4, 2), (7, 5), (12, 1)]
)
def test_global_batches_do_not_depend_on_the_world_size(feed, world_size, micro_batch_size):
    steps = all_ranks(feed, world_size, micro_batch_size)
    assert [(own[0].start, own[0].stop) for own in steps] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 45)]
    for own in steps:
        found = rows(own)
        assert sorted(found) == list(range(own[0].start, own[0].stop))
        for number, content in found.items():
            block = feed.block(number)
            assert content == tuple(block[name].tolist() for name in COLUMNS)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 3), (3, 2), (4, 2), (12, 1)])
def test_ranks_run_equal_micro_batches_and_their_counts_add_up(feed, world_size, micro_batch_size):
    for own in all_ranks(feed, world_size, micro_batch_size):
        shapes = [[tuple(batch["input_ids"].shape) for batch in step.micro_batches] for step in own]
        assert all(shape == shapes[0] for shape in shapes)
        assert all(0 < size <= micro_batch_size for size, _ in shapes[0])
        together = [
            sum(getattr(step, f"n_{what}") for step in own)
            for what in ("tokens", "eos", "padding", "labels", "bos")
        ]
        assert together == list(feed.counts(own[0].start, own[0].stop))
        for step in own:
            assert step.n_labels == sum(int((batch["labels"] != -100).sum()) for batch in step.micro_batches)


@pytest.mark.parametrize("document_mask", [True, False])
def test_documents_are_counted_without_padding(make_log, document_mask):
    packing = Packing(block_size=16, window_shards=2, document_mask=document_mask)
    feed = Feed([FeedSource("a", make_log(SHARDS))], packing, 0, 0.05)
    padded = 0
    for own in all_ranks(feed, 3, 2, stop=feed.samples_per_epoch):
        counts = feed.counts(own[0].start, own[0].stop)
        lengths = [length for step in own for length in step.documents.tolist()]
        assert all(lengths) and sum(lengths) == counts.n_tokens + counts.n_eos
        padded += counts.n_padding
        if not document_mask:
            assert len(lengths) == own[0].stop - own[0].start
        for step in own:
            rows = [row for batch in step.micro_batches for row in zip(*batch.values(), strict=True)]
            whole = [dict(zip(step.micro_batches[0], row, strict=True)) for row in rows]
            apart = sum(int((row["document_lengths"] > 0).sum()) for row in whole if row["sample"] >= 0)
            assert apart - len(whole) <= len(step.documents) <= apart
    assert padded > 0


def test_a_resumed_loader_goes_on_with_the_next_sample_over_an_epochs_end(feed):
    n = feed.samples_per_epoch
    whole = [rows(own) for own in all_ranks(feed, 2, 2, stop=2 * n + 5)]
    for done in (1, 3, n // 10):
        resumed = [rows(own) for own in all_ranks(feed, 3, 4, start=done * 10, stop=2 * n + 5)]
        assert resumed == whole[done:]


def test_bounds():
    assert list(global_batches([0], 7, 25, [10])) == [(0, 7, 10), (0, 10, 20), (0, 20, 25)]
    assert list(global_batches([0], 20, 20, [10])) == []
    endless = itertools.islice(global_batches([0, 7], 0, None, [4, 5]), 4)
    assert list(endless) == [(0, 0, 4), (0, 4, 7), (1, 7, 12), (1, 12, 17)]
    assert list(global_batches([0, 7, 9], 8, 9, [4, 5, 6])) == [(1, 8, 9)]


def test_tensors_and_waiting_time(feed):
    step = next(feed.loader(0, 1, global_batch_size=4, micro_batch_size=4))
    (batch,) = step.micro_batches
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (4, 16),
        "labels": (4, 16),
        "position_ids": (4, 16),
        "document_lengths": (4, 16),
        "sample": (4,),
    }
    assert all(tensor.is_contiguous() for tensor in batch.values())
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes.pop("document_lengths") == torch.int32 and set(dtypes.values()) == {torch.int64}
    assert step.wait_seconds > 0


def feed_threads() -> int:
    return sum(thread.name.startswith("raydist-feed") for thread in threading.enumerate())


def test_threads_end_with_their_loader(feed):
    sizes = {"global_batch_size": 4, "micro_batch_size": 2}
    before = feed_threads()
    closed, dropped = feed.loader(0, 1, **sizes), feed.loader(0, 1, **sizes)
    next(closed), next(dropped)
    assert feed_threads() == before + 2
    closed.close()
    del dropped
    gc.collect()
    for _ in feed.loader(0, 1, 0, 20, **sizes):
        pass
    assert feed_threads() == before


def test_an_error_in_the_thread_reaches_the_consumer(feed):
    for shard in feed.sources[0].log.shards:
        shard.path.unlink()
    before = feed_threads()
    with pytest.raises(LogError):
        next(feed.loader(0, 1, global_batch_size=4, micro_batch_size=2))
    assert feed_threads() == before


def test_a_rank_outside_the_world_is_refused(feed):
    with pytest.raises(ValueError, match="rank 2"):
        feed.loader(2, 2, global_batch_size=4, micro_batch_size=2)
