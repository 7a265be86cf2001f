"""The simulated clock of `make chaos-ettr`: every second is spent on one thing."""

from __future__ import annotations

import random

import pytest

from tests.chaos.ettr import AIM, DAYS, FAULTS, INTERVALS, Figures, Simulated, long_trace, simulate

FIGURES = Figures(restart=10.0, stall=2.0, step=1.0, save_steps=18)
"""A checkpoint every 20 s."""


def parts(spent: Simulated) -> tuple[float, float, float, float]:
    return spent.steps, spent.again, spent.restarts, spent.checkpoints


@pytest.mark.parametrize(
    ("faults", "back", "expected"),
    [
        ((), (), (90.0, 0.0, 0.0, 10.0)),
        ((50,), (), (72.0, 10.0, 10.0, 8.0)),  # two checkpoints and 10 steps, lost; then two more
        ((), (50,), (82.0, 0.0, 12.0, 6.0)),  # a checkpoint just before, and no step is lost
        ((50, 55), (), (69.0, 10.0, 15.0, 6.0)),  # a fault during a restart, which begins again
        ((95,), (), (72.0, 15.0, 5.0, 8.0)),
        ((200,), (300,), (90.0, 0.0, 0.0, 10.0)),
    ],
)
def test_a_hundred_seconds(
    faults: tuple[float, ...], back: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    spent = simulate(FIGURES, 100.0, faults, back)
    assert sum(parts(spent)) == pytest.approx(100)
    assert parts(spent) == pytest.approx(expected)


def test_the_long_trace_keeps_the_aim_if_a_restart_takes_15_seconds() -> None:
    """Half an interval of 36 per fault is trained again: 2.7 or 2.8%."""
    step, restart = 0.5, 15.0
    traces = [long_trace(Figures(restart, 0.05, step, 1), random.Random(n)) for n in range(5)]
    mean = sum(trace.ratio for trace in traces) / 5
    assert AIM < mean < 1 - 0.9 / (2 * INTERVALS)
    for trace in traces:
        assert sum(parts(trace)) == pytest.approx(DAYS * 86400)
        assert trace.restarts < 2 * FAULTS * (restart + 1)
