"""The share of a run's time that went into steps that count."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.track.ettr import effective_time


def begin(time: float, step: int = 0, attempt: int = 1, **seconds: float) -> dict[str, Any]:
    kind = "resume" if step else "start"
    return {"kind": kind, "step": step, "attempt": attempt, "time": time, "seconds": seconds}


def trained(time: float, step: int, attempt: int = 1, seconds: float = 1.0) -> dict[str, Any]:
    return {"kind": "train", "step": step, "attempt": attempt, "time": time, "step_seconds": seconds}


def ratio(*records: dict[str, Any]) -> tuple[float, float]:
    effective = effective_time(records)
    assert effective is not None
    return effective.step_seconds, effective.wall_seconds


def test_an_undisturbed_run_loses_its_start_and_what_is_no_step() -> None:
    """Its preparation is no part of the time; a step record stands for the steps since the one before."""
    first = begin(100, plan=1.0, prepare=500.0, start=4.0, load=6.0)
    assert ratio(first, trained(101, 1), trained(110, 10), trained(125, 20)) == (20.0, 10.0 + 25.0)


def test_steps_that_are_trained_again_count_once_and_as_they_were_last() -> None:
    lost = [begin(0, plan=0.0), trained(1, 1), trained(10, 10), trained(15, 15)]
    again = [begin(40, step=8, attempt=2, start=20.0), trained(42, 9, 2, 2.0), trained(44, 10, 2, 2.0)]
    assert ratio(*lost, *again) == (8.0 + 4.0, 44.0)
    assert ratio(*lost) == (15.0, 15.0)


def test_steps_without_a_record_count_where_a_checkpoint_holds_them() -> None:
    """The attempt ended with a checkpoint at step 14, and its last record was at 10."""
    first = [begin(0, plan=0.0), trained(1, 1), trained(20, 10, seconds=2.0)]
    assert ratio(*first, begin(50, step=14, attempt=2), trained(51, 15, 2)) == (1.0 + 18.0 + 8.0 + 1.0, 51.0)


def test_time_without_a_driver_does_not_count_and_planning_again_does() -> None:
    first = [begin(0, plan=0.0), trained(10, 10)]
    night = [begin(9000, step=8, attempt=2, plan=2.0, prepare=3.0, start=5.0), trained(9001, 9, 2)]
    assert ratio(*first, *night) == (9.0, 10.0 + 10.0 + 1.0)


def test_a_run_that_begins_again_has_lost_all_steps() -> None:
    first = [begin(0, plan=0.0), trained(7, 7)]
    assert ratio(*first, begin(20, attempt=2), trained(21, 1, 2)) == (1.0, 21.0)


def skip(step: int, action: str, attempt: int = 1, back_to: int | None = None) -> dict[str, Any]:
    return {"kind": "skip", "step": step, "action": action, "attempt": attempt, "back_to": back_to, "time": 1}


def test_steps_that_changed_nothing_or_were_thrown_away_do_not_count() -> None:
    first = [begin(0, plan=0.0), trained(5, 5), skip(7, "skipped"), trained(10, 10)]
    assert ratio(*first) == (9.0, 10.0)
    assert ratio(*first, skip(9, "recorded"))[0] == 9.0
    back = [*first, skip(15, "rolled back", back_to=6), trained(20, 20)]
    assert ratio(*back) == (6.0 + 5.0, 20.0)
    assert ratio(*first, skip(15, "rolled back"), trained(20, 20))[0] == 18.0, "to nothing: one step"
    again = [begin(30, step=6, attempt=2), trained(34, 10, 2)]
    assert ratio(*back, *again) == (6.0 + 4.0, 34.0)
    assert ratio(*back, *again[:1], skip(7, "skipped", 2), trained(34, 10, 2))[0] == 6.0 + 3.0


@pytest.mark.parametrize("records", [[], [begin(0)], [{"kind": "incident", "what": "x", "time": 1.0}]])
def test_before_the_first_step_nothing_is_known(records: list[dict[str, Any]]) -> None:
    assert effective_time(records) is None
