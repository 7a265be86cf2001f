"""The scores of steps, and what the job may ask for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydist.errors import JobError
from raydist.job.schema import Guards
from raydist.training.guard import Guard
from tests.train_parts import make_job

LOSSES = [2.0 + 0.1 * math.sin(17 * n) for n in range(40)]
NORMS = [1.0 + 0.2 * math.cos(23 * n) for n in range(40)]


def filled(n: int = 40, **settings: Any) -> Guard:
    guard = Guard(Guards(mode="on", **{"window": 40, **settings}))
    for loss, norm in zip(LOSSES[:n], NORMS[:n], strict=True):
        guard.took(guard.judge(loss, norm, 32))
    return guard


def test_a_score_is_the_modified_z_score_of_iglewicz_and_hoaglin() -> None:
    verdict = filled().judge(2.5, 1.4, 32)
    for score, value, window in ((verdict.loss_score, 2.5, LOSSES), (verdict.norm_score, 1.4, NORMS)):
        median = np.median(window)
        expected = 0.6745 * (value - median) / np.median(np.abs(window - median))
        assert score == pytest.approx(expected, rel=1e-4)


def test_a_spike_of_either_is_bad_and_a_fall_of_both_is_not() -> None:
    guard = filled()
    assert guard.judge(2.1, 1.2, 32).reason == ""
    assert guard.judge(0.0, 0.0, 32).reason == ""
    assert guard.judge(9.0, 1.0, 32).reason.startswith("the loss 9 is ")
    assert guard.judge(2.0, 9.0, 32).reason.startswith("the gradient norm 9 is ")
    assert "the median of 40 steps" in guard.judge(2.0, 9.0, 32).reason


def test_what_is_no_number_is_bad_from_the_first_step() -> None:
    assert filled(0).judge(math.nan, 1.0, 32).reason == "the loss is nan"
    assert filled(0).judge(2.0, math.inf, 32).reason == "the gradient norm is inf"


def test_nothing_is_a_spike_before_half_of_the_window_and_twenty_steps() -> None:
    assert filled(19).judge(99.0, 1.0, 32).reason == ""
    assert filled(20).judge(99.0, 1.0, 32).reason != ""
    assert filled(39, window=100).judge(99.0, 1.0, 32).loss_score is None


def test_after_equal_values_a_little_more_is_no_spike() -> None:
    guard = Guard(Guards(mode="on", window=20))
    for _ in range(20):
        guard.took(guard.judge(2.0, 1.0, 32))
    assert guard.judge(2.011, 1.005, 32).reason == ""
    assert guard.judge(2.013, 1.0, 32).reason != ""


def test_blocks_of_another_size_are_compared_with_their_own_kind() -> None:
    guard = filled()
    assert guard.judge(9.0, 9.0, 64).reason == ""


def test_a_guard_goes_on_from_json_as_it_was() -> None:
    guard, other = filled(), Guard(Guards(mode="on", window=40))
    guard.in_a_row, guard.rollbacks, guard.back_to = 2, 1, 30
    other.load(json.loads(json.dumps(guard.to_json())))
    assert other.to_json() == guard.to_json()
    assert other.judge(2.4, 1.3, 32) == guard.judge(2.4, 1.3, 32)


# --- bad input


@pytest.mark.parametrize(
    ("guards", "train", "said"),
    [
        (
            {"threshold": 1},
            {},
            r"guards\.threshold: at 1 deviations about 31\.73% of all good steps",
        ),
        ({"threshold": 2.5, "mode": "on"}, {"max_steps": 500}, r"1\.24% of all good steps"),
        (
            {"threshold": 1000},
            {},
            r"nothing would ever be a spike: .* 11 times their median",
        ),
        (
            {"mode": "on"},
            {"max_steps": 60},
            r"needs 64 steps .* and the run has 60; take 40 or less",
        ),
        (
            {"mode": "on"},
            {"max_steps": None, "max_tokens": 4 * 32 * 50},
            r"needs 64 steps before the first can be a spike, and the run has 50",
        ),
        ({"window": 8}, {}, r"guards\.window: Input should be greater than or equal to 20"),
        ({"max_skipped": 0}, {}, r"guards\.max_skipped: Input should be greater than or equal to 1"),
        ({"mode": "sometimes"}, {}, r"guards\.mode: Input should be 'off', 'record' or 'on'"),
    ],
)
def test_settings_that_would_skip_everything_or_nothing_are_refused(
    guards: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):
        make_job(Path("runs"), guards=guards, train=train)


def test_short_runs_may_have_the_defaults() -> None:
    assert make_job(Path("runs"), train={"max_steps": 5}).guards.mode == "record"
    assert make_job(Path("runs"), train={"max_steps": 65}, guards={"mode": "on"}).guards.window == 128
