"""The report's curves as inline SVG: text stays text, and colours are the page's (light, dark, print)."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydist.track.records import Record, evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, RULE = "#0a0b0c", "#0d0e0f"
SERIES = ("#1a0001", "#1a0002", "#1a0003", "#1a0004", "#1a0005", "#1a0006")
COLOURS = {INK: "var(--muted)", RULE: "var(--rule)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
"""Colours that stand for the page's variables while matplotlib draws."""

MOST_POINTS = 2000


@dataclass(frozen=True)
class Plot:
    """`legend`: (name, CSS colour) of each curve, if there are several."""

    title: str
    unit: str
    legend: list[tuple[str, str]]
    svg: str


@dataclass(frozen=True)
class Curve:
    """x in steps; `y` is NaN where a value is missing."""

    name: str
    x: list[float]
    y: list[float]


def plots(records: Sequence[Record]) -> list[Plot]:
    """One for each thing that was recorded at all."""
    train = [r | {"data_wait": _data_wait(r)} for r in records if r["kind"] == "train"]
    perplexity = [_curve(of, "perplexity", source) for source, of in evaluations(records).items()]
    rate = "tokens per second"
    drawn = [
        _plot("Loss", "nats per token", [_curve(train, "loss")], smooth=True),
        _plot("Held-out perplexity", "", perplexity, marks=True),
        _plot("Throughput", rate, [_curve(train, "tokens_per_second")], zero=True, smooth=True),
        _plot("Waiting for data", "% of step time", [_curve(train, "data_wait")], zero=True, smooth=True),
        _plot("Learning rate", "", [_curve(train, "learning_rate")], zero=True),
        _plot("Gradient norm", "before clipping", [_curve(train, "grad_norm")], zero=True, smooth=True),
    ]
    return [plot for plot in drawn if plot]


def _curve(records: Sequence[Record], key: str, name: str = "") -> Curve:
    thin = records[:: max(1, len(records) // MOST_POINTS)]
    return Curve(name or key, [r["step"] for r in thin], [_finite(r.get(key)) for r in thin])


def _data_wait(record: Record) -> float | None:
    """Percent of the step's time."""
    wait, seconds = record.get("data_wait_seconds"), record.get("step_seconds")
    return 100 * wait / seconds if wait is not None and seconds else None


def _plot(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    zero: bool = False,
    marks: bool = False,
    smooth: bool = False,
) -> Plot | None:
    """None when no curve has a value. `zero`: the scale begins there.

    `marks`: few points are marked, and a wide range is shown on a log scale.
    """
    known = [y for c in curves for y in c.y if math.isfinite(y)]
    if not known:
        return None
    log = marks and max(known) >= 20 * min(known) > 0
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "raydist", "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve, colour in zip(curves, itertools.cycle(SERIES), strict=False):
            _draw(axes, curve, colour, marks=marks, smooth=smooth)
        _dress(axes, log=log, top=max(known) if zero else 0)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    named = zip(curves, itertools.cycle(SERIES), strict=False)
    legend = [(curve.name, COLOURS[colour]) for curve, colour in named] if len(curves) > 1 else []
    return Plot(title, "log scale" if log else unit, legend, _inline(stream.getvalue(), title))


def _draw(axes: Axes, curve: Curve, colour: str, *, marks: bool, smooth: bool) -> None:
    """The series has the SVG id `series-<name>`; a noisy one is drawn faint under its moving mean."""
    y = curve.y
    sparse = (marks and len(y) <= 40) or sum(map(math.isfinite, y)) == 1
    averaged = smooth and len(y) >= 40
    (line,) = axes.plot(
        curve.x,
        y,
        color=colour,
        linewidth=1.0 if averaged else 1.6,
        alpha=0.35 if averaged else 1,
        marker="o" if sparse else None,
        markersize=3.2,
        solid_joinstyle="round",
    )
    line.set_gid("series-" + re.sub(r"\W+", "-", curve.name))
    if averaged:
        axes.plot(curve.x, _moving_mean(y, max(2, len(y) // 50)), color=colour, linewidth=1.8)


def _moving_mean(values: Sequence[float], most: int) -> list[float]:
    """Mean of the known values within `most` places of each; fewer near the ends, so that it does not lag."""
    means = []
    for i in range(len(values)):
        reach = min(most, i, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _dress(axes: Axes, *, log: bool, top: float) -> None:
    """Quiet axes. `top` above 0: the scale begins at 0 and has room above `top`."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_tick)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_tick)
    if top > 0:
        axes.set_ylim(0, 1.12 * top)
    axes.set_xlim(left=0)


def _tick(value: float, _place: float) -> str:
    """12000 -> 12k, 0.0006 -> 6e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if value and abs(value) < 1e-2:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.3g}"


def _inline(svg: str, title: str) -> str:
    """Only the <svg> element; ids made unique within the page; colours left to the page."""
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{prefix}-", svg)
    head = rf'<svg \1 role="img" aria-label="{title}">'
    svg = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', head, svg, count=1)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("xlink:href", "href")


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
