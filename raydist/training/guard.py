"""Which steps are bad: a loss or gradient norm that is no number, or far above those of the steps before.

    loss, norm ─▶ Guard.judge ─▶ Verdict: scores, reason
                     └── two windows: losses and norms of the last steps that were taken

The score of a value x is (x - median) / (1.4826 MAD) over a window, with MAD the median absolute deviation:
the modified z-score of Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers". For normal values it
counts standard deviations, and half of the window may be outliers without moving it. It is one-sided, since
a loss that falls is no fault.

The defaults, a window of 128 steps and 6 deviations, and no score before half a window and 20 steps, are
those of OLMo-core's SkipStepOptimizer (allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py:
rolling_interval_length, sigma_factor). It takes mean and standard deviation, over all steps; here those that
were skipped are left out.

Nothing here knows of ranks: equal numbers give equal verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from raydist.job.rules import scored_from
from raydist.job.schema import Guards

NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
FLOOR = 1e-3
"""A deviation is at least this share of the median, so that after equal values the next one is no spike."""


@dataclass(frozen=True)
class Typical:
    """Of the values in a window. deviation: as a standard deviation."""

    median: float
    deviation: float

    def score(self, value: float, weight: float = 1.0) -> float:
        """Deviations above the median. weight: of the value, where those in the window have weight 1."""
        if not math.isfinite(value):
            return math.inf
        return (value - self.median) * math.sqrt(weight) / self.deviation


@dataclass(frozen=True)
class Verdict:
    """reason: why the step is bad, for people; "" where it is not. Scores are None while windows fill up."""

    loss: float
    norm: float
    loss_score: float | None = None
    norm_score: float | None = None
    reason: str = ""
    is_short: bool = False


class Guard:
    """Judges the steps of a run in order. in_a_row: bad steps until now.  rollbacks: of the whole run.

    back_to: the step of the checkpoint that they lead back to; None where there is none yet.
    """

    def __init__(self, settings: Guards) -> None:
        self.settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._block_size = 0
        self.in_a_row = self.rollbacks = 0
        self.back_to: int | None = None

    def judge(self, loss: float, norm: float, block_size: int, *, is_short: bool = False) -> Verdict:
        """loss: mean over the labels of the global batch.  norm: before clipping.

        Blocks of another size (a curriculum's next stage) have other losses, so the windows begin again.
        is_short: the batch has fewer samples than the others, so that both vary more: they are not compared.
        """
        if block_size != self._block_size:
            self.clear_windows()
            self._block_size = block_size
        told, scores = [], []
        for name, value, window in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            typical = None if is_short else self._typical(window)
            score = None if typical is None or not math.isfinite(value) else typical.score(value)
            scores.append(score)
            if not math.isfinite(value):
                told.append(f"the {name} is {value}")
            elif typical is not None and score is not None and score > self.settings.threshold:
                told.append(
                    f"the {name} {value:.4g} is {score:.1f} deviations above {typical.median:.4g}, the median"
                    f" of {len(window)} steps"
                )
        return Verdict(loss, norm, scores[0], scores[1], "; ".join(told), is_short)

    def took(self, verdict: Verdict) -> None:
        """The step that was judged is taken."""
        self.in_a_row = 0
        if math.isfinite(verdict.loss) and math.isfinite(verdict.norm) and not verdict.is_short:
            self._losses.append(verdict.loss)
            self._norms.append(verdict.norm)

    @property
    def typical_loss(self) -> Typical | None:
        """None until enough steps were taken."""
        return self._typical(self._losses)

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "block_size": self._block_size,
            "in_a_row": self.in_a_row,
            "rollbacks": self.rollbacks,
            "back_to": self.back_to,
        }

    def load(self, known: dict[str, Any]) -> None:
        self.load_windows(known)
        self.in_a_row, self.rollbacks, self.back_to = (
            known["in_a_row"],
            known["rollbacks"],
            known["back_to"],
        )

    def load_windows(self, known: dict[str, Any]) -> None:
        self._losses, self._norms = self._window(known["losses"]), self._window(known["norms"])
        self._block_size = known["block_size"]

    def clear_windows(self) -> None:
        """What comes now is not comparable with the steps before."""
        self._losses.clear()
        self._norms.clear()

    def _window(self, values: Iterable[float]) -> deque[float]:
        return deque(values, maxlen=self.settings.window)

    def _typical(self, window: Sequence[float]) -> Typical | None:
        if len(window) < scored_from(self.settings.window):
            return None
        median = statistics.median(window)
        spread = statistics.median(abs(value - median) for value in window)
        return Typical(median, max(NORMAL * spread, FLOOR * abs(median), 1e-12))
