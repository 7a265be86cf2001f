"""Curves and points as inline SVG: text stays text, colours are the page's variables (light, dark, print)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raydist.track.humanize import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE = "#0a0b0a", "#0a0b0c", "#0d0e0f"
SERIES = ("#1a0001", "#1a0002", "#1a0003", "#1a0004", "#1a0005", "#1a0006")
COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule"} | {c: f"series-{i}" for i, c in enumerate(SERIES)}
"""Placeholder colours for matplotlib; each is replaced by the page's variable of that name."""

MOST_MARKED = 40
"""Up to this many points are drawn with markers."""


@dataclass(frozen=True)
class Curve:
    """y: None or NaN where a value is missing.  style: matplotlib's keywords for a line.

    If x is text, each value is a place on the axis. A curve without a name is not in the legend.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    style: dict[str, Any] = field(default_factory=dict)


def draw(
    title: str, unit: str, curves: Sequence[Curve], x_label: str, *, zero: bool = False, log: str = ""
) -> str:
    """An <svg>; "" if no curve has a value. zero: y begins at 0.  log: axes that may be logarithmic."""
    known = [y for curve in curves for y in _finite(curve.y) if math.isfinite(y)]
    if not known:
        return ""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xlabel=x_label)
        for curve in curves:
            _line(axes, curve)
        _scale(axes, "x", [x for curve in curves for x in curve.x], log="x" in log)
        log_y = _scale(axes, "y", known, log="y" in log)
        if zero and max(known) > 0:
            axes.set_ylim(0, 1.12 * max(known))
        axes.set_title(title, loc="left", weight="bold")
        axes.set_title("log scale" if log_y else unit, loc="right", color=MUTED)
        if sum(bool(curve.name) for curve in curves) > 1:
            figure.legend(loc="outside lower left", ncols=4)
        stream = io.StringIO()
        unsigned = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=unsigned)
    return _inline(stream.getvalue(), title)


def smoothed(curve: Curve) -> list[Curve]:
    """A noisy curve, drawn faintly under its moving mean; a short curve as it is."""
    if len(curve.y) <= MOST_MARKED:
        return [curve]
    y, widest = _finite(curve.y), max(2, len(curve.y) // 50)
    means = []
    for i in range(len(y)):
        reach = min(
            widest, i, len(y) - 1 - i
        )  # a smaller window near the ends, so that the mean does not lag
        window = [v for v in y[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    faint = {"color": SERIES[0], "linewidth": 1.0, "alpha": 0.35}
    return [Curve(curve.name, curve.x, y, faint), Curve("", curve.x, means, {"color": SERIES[0]})]


def _settings() -> Any:
    """matplotlib's settings."""
    from cycler import cycler

    return (
        {"svg.fonttype": "none", "svg.hashsalt": "raydist", "text.parse_math": False, "font.size": 9}
        | dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False)
        | dict.fromkeys(("axes.edgecolor", "grid.color"), RULE)
        | dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor", "legend.labelcolor"), MUTED)
        | {f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")}
        | {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlecolor": INK}
        | {"lines.linewidth": 1.6, "lines.markersize": 3.2, "lines.solid_joinstyle": "round"}
        | {"axes.titlesize": 10, "legend.frameon": False, "axes.prop_cycle": cycler(color=SERIES)}
    )


def _line(axes: Axes, curve: Curve) -> None:
    """Draw the curve; its SVG id is `series-<name>`."""
    y = _finite(curve.y)
    few = sum(map(math.isfinite, y)) <= MOST_MARKED
    (line,) = axes.plot(curve.x, y, **{"marker": "o" if few else None, **curve.style})
    if curve.name:
        line.set(label=curve.name, gid="series-" + re.sub(r"\W+", "-", curve.name))


def _scale(axes: Axes, name: str, values: Sequence[Any], *, log: bool) -> bool:
    """Set few ticks with short numbers, unless the values are text. True if the scale is logarithmic."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    if any(isinstance(value, str) for value in values):
        axes.margins(x=0.2)
        return False
    if wide := log and max(values) > 20 * min(values) > 0:
        axes.set(**{f"{name}scale": "log"})
        between = (1, 2, 5) if max(values) < 1e4 * min(values) else (1,)
        axis.set_major_locator(LogLocator(subs=between, numticks=7))
        axis.set_minor_formatter(NullFormatter())
    else:
        whole = all(isinstance(value, int) for value in values)
        axis.set_major_locator(MaxNLocator(6 if name == "x" else 4, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: short(value) if abs(value) >= 1000 else f"{value:.3g}")
    return wide


def _inline(svg: str, title: str) -> str:
    """The <svg> element alone, with ids that are unique in the page and the page's colour variables."""
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{prefix}-", svg[svg.index("<svg") :])
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("xlink:href", "href")


def _finite(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]
