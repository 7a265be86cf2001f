"""How much of a run's time went into steps that count: its effective training time ratio (ETTR).

    from the first attempt's plan ──── steps ──── lost steps ── restart ── steps ── evaluation ── steps ──▶
                                       counted                            counted                 counted

docs/design.md defines it and names where the term comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raydist.track.records import Record


@dataclass(frozen=True)
class EffectiveTime:
    """step_seconds: of steps that count.  wall_seconds: while a driver was alive."""

    step_seconds: float
    wall_seconds: float

    @property
    def ratio(self) -> float:
        return min(1.0, self.step_seconds / self.wall_seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "step_seconds": self.step_seconds,
            "wall_seconds": self.wall_seconds,
        }


def effective_time(written: Iterable[Record]) -> EffectiveTime | None:
    """Of all records of a run; None before its first step."""
    records = sorted(written, key=lambda record: record.get("attempt", 0))
    seconds = _step_seconds(records)
    wall = sum(_wall(session) for session in _sessions(records))
    return EffectiveTime(seconds, wall) if seconds > 0 and wall > 0 else None


@dataclass(frozen=True)
class _Stretch:
    """Steps after `start` up to `end`, which took so long each."""

    start: int
    end: int
    each: float

    def up_to(self, step: int) -> _Stretch:
        return _Stretch(self.start, min(self.end, step), self.each)

    def seconds_without(self, skipped: Iterable[tuple[int, int]]) -> float:
        """skipped: spans of steps, as `start` and `end`, none of which overlap."""
        inside = (min(self.end, end) - max(self.start, start) for start, end in skipped)
        return (self.end - self.start - sum(max(0, steps) for steps in inside)) * self.each


def _step_seconds(records: list[Record]) -> float:
    """Of each step once, without those that were trained again and those whose work was thrown away.

    A record tells the mean of the steps since the one before. Steps that a checkpoint holds and no record
    does took as long as those before them.
    """
    counted, skipped, at = list[_Stretch](), list[tuple[int, int]](), 0
    for record in records:
        kind, step = record["kind"], int(record.get("step") or 0)
        goes_back = kind == "train" and step <= at
        if kind in ("start", "resume") or goes_back:
            begin = step - 1 if goes_back else step
            if begin > at and counted:
                counted.append(_Stretch(at, begin, counted[-1].each))
            counted = [stretch.up_to(begin) for stretch in counted if stretch.start < begin]
            skipped, at = [span for span in skipped if span[1] <= begin], begin
        if kind == "train" and record.get("step_seconds"):
            counted.append(_Stretch(at, step, record["step_seconds"]))
            at = step
        if kind == "skip" and record["action"] != "recorded":
            back_to = record.get("back_to")
            start = step - 1 if back_to is None else int(back_to)
            skipped = [*(span for span in skipped if span[1] <= start), (start, step)]
    return sum(stretch.seconds_without(skipped) for stretch in counted)


# --- the time that there was


def _sessions(records: list[Record]) -> Iterator[list[Record]]:
    """The records of each driver's attempts. Only the first attempt of a driver has its planning."""
    session = list[Record]()
    for record in records:
        if record["kind"] in ("start", "resume") and "plan" in record.get("seconds", {}) and session:
            yield session
            session = []
        session.append(record)
    if session:
        yield session


def _wall(session: list[Record]) -> float:
    """From the driver's begin to the last record. The preparation of a run that has not begun is left out."""
    timed = [record for record in session if record.get("time") is not None]
    begun = next((record for record in timed if record["kind"] in ("start", "resume")), None)
    if begun is None:
        return 0.0
    left_out = ("plan", "prepare") if begun["kind"] == "start" else ()
    before = [float(spent) for name, spent in begun.get("seconds", {}).items() if name not in left_out]
    return float(max(record["time"] for record in timed) - begun["time"]) + sum(before)
