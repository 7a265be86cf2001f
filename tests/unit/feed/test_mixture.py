import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.errors import JobError
from raydist.feed.mixture import PERIOD, Mixture, round_weights, tabulate


def deviations(units: list[int], table: np.ndarray) -> np.ndarray:
    """Samples of each source less its share, after each g of a period, [sources, PERIOD]."""
    taken = np.cumsum(table[None, :] == np.arange(len(units))[:, None], axis=1)
    return taken - np.arange(1, PERIOD + 1) * np.array(units)[:, None] / PERIOD


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20))
def test_every_source_stays_within_one_sample_of_its_share(weights):
    units = round_weights(weights)
    gap = np.abs(deviations(units, tabulate(units))).max()
    assert gap <= 1 - 1 / max(1, 2 * len(units) - 2)


@pytest.mark.parametrize(
    "weights", [[0.5, 0.5], [0.95, 0.05], [1 / 3] * 3, [0.999, 0.0005, 0.0005], [0.02] * 50]
)
def test_known_mixtures_keep_the_bound(weights):
    units = round_weights(weights)
    assert np.abs(deviations(units, tabulate(units))).max() < 1


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=60))
def test_rounded_weights_add_up_and_stay_near(weights):
    units = round_weights(weights)
    assert sum(units) == PERIOD
    assert np.abs(np.array(units) - np.array(weights) / np.sum(weights) * PERIOD).max() < 1 + 1e-6


def test_a_weight_that_would_never_be_drawn_is_refused():
    with pytest.raises(JobError, match="2\\^-16"):
        round_weights([1 - 1e-6, 1e-6])


def test_locate_and_before_agree_over_periods():
    mixture = Mixture([0.7, 0.2, 0.1])
    sources, nth = mixture.locate(np.arange(3 * PERIOD))
    for source in range(3):
        assert np.array_equal(nth[sources == source], np.arange(np.count_nonzero(sources == source)))
    for g in (0, 1, 17, PERIOD - 1, PERIOD, PERIOD + 1, 3 * PERIOD):
        assert mixture.before(g).tolist() == np.bincount(sources[:g], minlength=3).tolist()


def test_values_never_change():
    """Checkpoints hold positions in this table: if this fails, the code is wrong, not the test."""
    assert Mixture([0.6, 0.3, 0.1]).table[:20].tolist() == GOLDEN


GOLDEN = [0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1]


def test_fifty_sources_are_tabulated_within_a_second():
    weights = np.random.default_rng(0).dirichlet(np.ones(50)) + 0.001
    began = time.process_time()
    Mixture(weights.tolist())
    assert time.process_time() - began < 1
