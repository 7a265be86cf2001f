"""One self-contained page of a sweep: its trials, best first, and the metric against each parameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydist import files
from raydist.folder import RunFolder
from raydist.track.humanize import shown
from raydist.track.plots import MUTED, SERIES, Curve, draw
from raydist.track.report import page

STATES = ("finished", "pruned", "running", "stopped", "failed")


@dataclass(frozen=True)
class Trial:
    """One trial. tokens: trained so far.  curve: (tokens, bits per byte) of each evaluation.

    parameters: dotted key -> value.  bits_per_byte: of the last evaluation; lower is better.
    state: running, finished, pruned (ended early by the scheduler), stopped (on request) or failed.
    """

    name: str
    parameters: dict[str, Any]
    state: str
    bits_per_byte: float | None
    tokens: int
    curve: list[tuple[int, float]]
    error: str = ""


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first: in the order of STATES, and within a state by bits per byte."""
    return sorted(trials, key=lambda trial: (STATES.index(trial.state), _bits(trial)))


def write_sweep_page(folder: RunFolder, trials: Sequence[Trial], *, state: str = "", error: str = "") -> Path:
    """Write the page, with the sweep's job, into the sweep's folder."""
    trials = ranked(trials)
    best = trials[0] if trials and math.isfinite(_bits(trials[0])) else None
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    counts = Counter(trial.state for trial in trials)
    text = page(
        "sweep.html.j2",
        folder,
        state=state,
        error=error,
        trials=trials,
        best=best,
        keys=keys,
        states=", ".join(f"{n} {state}" for state, n in counts.items()),
        plots=[_curves(trials, best), *(_scatter(key, trials, best) for key in keys)],
    )
    files.write_text(folder.sweep_page, text)
    return folder.sweep_page


def _curves(trials: Sequence[Trial], best: Trial | None) -> str:
    """A curve for each trial; the best one is drawn last, over the others."""
    faint = {"color": MUTED, "linewidth": 1.0, "alpha": 0.5, "markersize": 2.0}
    strong = {"color": SERIES[0], "linewidth": 2.2}
    curves = []
    for trial in reversed(trials):
        x, y = [tokens for tokens, _ in trial.curve], [bits for _, bits in trial.curve]
        is_best = trial is best
        curves.append(Curve("best" if is_best else "", x, y, strong if is_best else faint))
    return draw("All trials", "best emphasized", curves, "tokens")


def _scatter(key: str, trials: Sequence[Trial], best: Trial | None) -> str:
    """A dot for each trial that was evaluated; a ring for one that did not finish."""
    evaluated = [trial for trial in trials if key in trial.parameters and math.isfinite(_bits(trial))]
    values = [trial.parameters[key] for trial in evaluated]
    numeric = all(type(value) in (int, float) for value in values)
    places = values if numeric else [shown(value) for value in values]
    # a curve without values puts the categories in order
    curves = [] if numeric else [Curve("", sorted(set(places)), [None] * len(set(places)))]
    dot = {"linestyle": "none", "marker": "o", "markersize": 5.0, "color": MUTED}
    ring, big = dot | {"fillstyle": "none"}, dot | {"markersize": 8.0, "color": SERIES[0]}
    groups = [
        "best" if t is best else "finished" if t.state == "finished" else "not finished" for t in evaluated
    ]
    for name, style in (("finished", dot), ("not finished", ring), ("best", big)):
        members = [i for i, group in enumerate(groups) if group == name]
        x, y = [places[i] for i in members], [_bits(evaluated[i]) for i in members]
        curves.append(Curve(name, x, y, style))
    return draw(key, "", curves, "", log="x")


def _bits(trial: Trial) -> float:
    """Bits per byte; infinite if there are none, so that the trial comes last."""
    bits = trial.bits_per_byte
    return bits if bits is not None and math.isfinite(bits) else math.inf
