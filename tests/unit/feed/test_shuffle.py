from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydist.feed.shuffle import Stream, permute, round_keys


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_the_permutation_is_a_bijection(n, seed, window):
    image = permute(np.arange(n), n, round_keys(seed, "s", 0, window))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_one_image_does_not_depend_on_the_others_asked_for():
    keys = round_keys(7, "s", 1, 2)
    together = permute(np.arange(1000), 1000, keys)
    assert [int(permute(np.array([i]), 1000, keys)[0]) for i in range(0, 1000, 37)] == together[::37].tolist()


def test_values_never_change():
    """Checkpoints hold positions in this order: if this fails, the code is wrong, not the test."""
    assert permute(np.arange(12), 12, round_keys(0, "stream", 0, 0)).tolist() == GOLDEN_12
    big = permute(np.array([0, 1, 2, 10**9]), 10**12 + 39, round_keys(2**62, "stream", 3, 5)).tolist()
    assert big == GOLDEN_BIG


GOLDEN_12 = [5, 2, 1, 6, 8, 3, 11, 7, 10, 4, 9, 0]
GOLDEN_BIG = [763735225531, 537520575995, 484416987819, 864790657048]


@pytest.mark.parametrize("changed", [(1, "s", 0, 0), (0, "t", 0, 0), (0, "s", 1, 0), (0, "s", 0, 1)])
def test_seed_stream_epoch_and_window_each_change_the_order(changed):
    plain = permute(np.arange(500), 500, round_keys(0, "s", 0, 0))
    other = permute(np.arange(500), 500, round_keys(*changed))
    assert np.count_nonzero(plain == other) < 15


def test_small_permutations_are_drawn_evenly():
    seen = Counter(
        tuple(permute(np.arange(3), 3, round_keys(seed, "s", 0, 0)).tolist()) for seed in range(6000)
    )
    assert len(seen) == 6
    assert max(seen.values()) < 1.25 * min(seen.values())


def test_neighbours_end_up_unrelated():
    n = 20_000
    image = permute(np.arange(n), n, round_keys(3, "s", 0, 0)).astype(float)
    for lag in (1, 2, 16, 128):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.03


BLOCKS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(BLOCKS, st.integers(1, 5))
def test_an_epoch_is_every_block_once_and_windows_follow_each_other(blocks, window_shards):
    stream = Stream("s", 0, np.array(blocks), window_shards)
    for epoch in range(2):
        shards, of_shard = stream.locate(epoch * stream.n_blocks + np.arange(stream.n_blocks))
        places = list(zip(shards.tolist(), of_shard.tolist(), strict=True))
        assert sorted(places) == [(shard, block) for shard, n in enumerate(blocks) for block in range(n)]
        assert np.all(np.diff(shards // window_shards) >= 0)


def test_each_epoch_has_its_own_order():
    stream = Stream("s", 0, np.array([50, 50]), 2)
    first, second = (stream.locate(np.arange(100) + start) for start in (0, 100))
    assert not np.array_equal(first[1], second[1])


def test_the_order_does_not_depend_on_how_much_follows():
    short = Stream("s", 5, np.array([9, 4, 7, 8]), 2).locate(np.arange(28))
    long = Stream("s", 5, np.array([9, 4, 7, 8, 6, 5]), 2).locate(np.arange(28))
    assert np.array_equal(short, long)


@given(BLOCKS, st.integers(1, 5), st.integers(0, 100), st.integers(0, 100))
def test_spans_cover_a_range_in_order(blocks, window_shards, start, length):
    stream = Stream("s", 0, np.array(blocks), window_shards)
    covered = [
        epoch * stream.n_blocks + stream.window_start(window) + i
        for epoch, window, lo, hi in stream.spans(start, start + length)
        for i in range(lo, hi)
    ]
    assert covered == list(range(start, start + length))
