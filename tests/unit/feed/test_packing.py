import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raydist.feed.packing import PackIndex, best_fit_decreasing, pack

LENGTHS = st.lists(st.integers(1, 70), max_size=40)


def inputs_of(index: PackIndex, lengths: list[int]) -> Counter:
    """(document, position) of every input; the position after the last token is the EOS."""
    begins = np.cumsum([0, *lengths])
    return Counter(
        (int(document), int(offset - begins[document]) + i)
        for document, offset, length in zip(index.document, index.offset, index.length, strict=True)
        for i in range(length)
    )


@given(
    LENGTHS,
    st.integers(1, 24),
    st.sampled_from(["concat", "best_fit"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@example([16], 16, "best_fit", False, None)
@example([16], 16, "best_fit", True, None)
@example([15, 1, 160, 1], 16, "concat", True, None)
def test_every_input_of_every_kept_document_is_in_exactly_one_block(
    lengths, block_size, strategy, eos, random
):
    keep = [random is None or random.random() < 0.8 for _ in lengths]
    index = pack(
        np.array(lengths, np.int64), np.array(keep, bool), block_size=block_size, strategy=strategy, eos=eos
    )
    expected = {(d, i) for d, n in enumerate(lengths) if keep[d] for i in range(n + eos)}
    assert inputs_of(index, lengths) == Counter(expected)
    filled = [index.length[a:b].sum() for a, b in zip(index.first, index.first[1:], strict=False)]
    assert all(0 < n <= block_size for n in filled)
    assert index.first[0] == 0
    assert index.first[-1] == len(index.length)


@given(LENGTHS, st.integers(1, 24), st.sampled_from(["concat", "best_fit"]), st.booleans())
def test_counts_of_each_block_are_those_of_its_inputs(lengths, block_size, strategy, eos):
    index = pack(
        np.array(lengths, np.int64),
        np.ones(len(lengths), bool),
        block_size=block_size,
        strategy=strategy,
        eos=eos,
    )
    for block in range(index.n_blocks):
        of = slice(index.first[block], index.first[block + 1])
        ends = sum(rest == 0 for rest in index.rest[of])
        filled = sum(index.length[of])
        assert index.counts[block].tolist() == [
            filled - ends * eos,
            ends * eos,
            block_size - filled,
            filled - ends,
        ]
    assert index.counts.sum(axis=0)[0] == sum(lengths)


@given(LENGTHS, st.integers(1, 24))
def test_concat_fills_every_block_but_the_last(lengths, block_size):
    index = pack(
        np.array(lengths, np.int64),
        np.ones(len(lengths), bool),
        block_size=block_size,
        strategy="concat",
        eos=True,
    )
    assert index.n_blocks == -(-(sum(lengths) + len(lengths)) // block_size)
    assert (index.counts[:-1, 2] == 0).all()


@given(LENGTHS, st.integers(1, 24))
def test_best_fit_cuts_only_documents_longer_than_a_block(lengths, block_size):
    index = pack(
        np.array(lengths, np.int64),
        np.ones(len(lengths), bool),
        block_size=block_size,
        strategy="best_fit",
        eos=True,
    )
    for document, pieces in Counter(index.document.tolist()).items():
        assert pieces == -(-(lengths[document] + 1) // block_size)


@given(st.lists(st.integers(1, 40), max_size=120))
def test_best_fit_decreasing_is_the_textbook_rule(sizes):
    sizes.sort(reverse=True)
    rooms: list[int] = []
    for size in sizes:  # one item at a time: the open bin with the least room that fits, else a new one
        fitting = [room for room in rooms if room >= size]
        room = min(fitting) if fitting else 40
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    bins = best_fit_decreasing(np.array(sizes, np.int64), 40)
    filled = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert sorted(40 - filled) == sorted(rooms)


def test_an_index_survives_storage():
    index = pack(
        np.array([5, 40, 3]), np.array([True, True, False]), block_size=16, strategy="best_fit", eos=True
    )
    back = PackIndex.from_flat(index.flat())
    assert all(
        np.array_equal(getattr(back, name), getattr(index, name)) for name in index.__dataclass_fields__
    )


@pytest.mark.parametrize("strategy", ["concat", "best_fit"])
def test_a_million_documents_are_packed_in_seconds(strategy):
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.2, 0.9, 10**6)).astype(np.int64)
    began = time.process_time()
    index = pack(lengths, np.ones(10**6, bool), block_size=2048, strategy=strategy, eos=True)
    assert time.process_time() - began < 5
    assert index.counts[:, 2].sum() < 0.001 * index.n_blocks * 2048
