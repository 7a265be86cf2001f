"""What a person sees while a run goes on: a calm live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raydist.track.records import Record

PREPARE_SECONDS = 5.0
"""Least time between plain lines of preparation."""

RECENT_RECORDS = 20
CURVE_POINTS = 24
LONGEST_NAME = 24
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.|[\x00-\x08\x0b-\x1f\x7f]")


class Progress:
    """Use as a context manager. With a terminal, whatever else is printed appears above the live view.

    `total_steps` is set when it is known.
    """

    def __init__(
        self, stream: TextIO | None = None, *, name: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self._clock = 0, clock
        self._stream = stream or sys.stderr
        self._view = View(name, clock)
        console = Console(file=self._stream, highlight=False)
        fits = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        # catches what else is printed to this terminal, but not what is piped elsewhere
        out, err = sys.stdout.isatty(), sys.stderr.isatty()
        live = Live(
            self._view, console=console, refresh_per_second=4, redirect_stdout=out, redirect_stderr=err
        )
        self._live = live if fits else None
        self._last_prepared = -float("inf")

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._view.mark = Text("✓", "green") if error is None else Text("✗", "red")
        if self._live:
            self._live.stop()

    def phase(self, name: str, detail: str = "") -> None:
        """Say what is done now: planning, preparing, training, ..."""
        self._view.begin(name, detail)
        self._plain(f"{name}: {detail}" if detail else name)

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        """`done` of `total` slices; what is in them so far."""
        facts = f"{documents:,} documents  {tokens:,} tokens"
        self._view.advance(done, total, f"slice {done:,}/{total:,}", [facts])
        now = self._clock()
        if done == total or now - self._last_prepared >= PREPARE_SECONDS:
            self._last_prepared = now
            self._plain(f"slice {done:,}/{total:,}  {facts}")

    def record(self, record: Record) -> None:
        """Show one record of metrics.jsonl."""
        kind = record.get("kind")
        if kind == "train":
            self._train(record)
        elif kind == "eval":
            self._view.evaluated(record)
            shown = f"perplexity {number(record['perplexity'])}"
            self._plain(f"eval  step {record['step']:,}  {record['source']}  {shown}")
        elif kind == "incident":
            self.message(f"incident: {record.get('what', '')}")
        elif kind == "resume":
            self._view.rewind(record["step"])
            self.message(f"resumed at step {record['step']:,} with {workers(record.get('world_size', 1))}")

    def message(self, text: str) -> None:
        """A lasting line."""
        if self._live:
            self._live.console.print(clean(text), markup=False, soft_wrap=True)
        self._plain(text)

    def _train(self, record: Record) -> None:
        step, total = record["step"], max(self.total_steps, record["step"])
        self._view.trained(record, total)
        remaining = self._view.remaining_seconds()
        facts = [f"step {step:,}/{total:,}", f"loss {number(record['loss'])}", *rates(record)]
        self._plain("  ".join(facts if remaining is None else [*facts, f"ETA {duration(remaining)}"]))

    def _plain(self, text: str) -> None:
        if self._live is None:
            self._stream.write(clean(text) + "\n")
            self._stream.flush()


class View:
    """The live view: a line of progress, then figures. Holds the state that is drawn."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…", clock
        self._seconds: deque[float] = deque(maxlen=RECENT_RECORDS)
        self._losses: list[tuple[int, float]] = []
        self._perplexity: dict[str, tuple[float, float]] = {}
        self.mark: Spinner | Text = Spinner("dots", style="cyan")
        self.begin("starting", "")

    def begin(self, phase: str, detail: str) -> None:
        self._phase, self._began, self._facts = phase, self._clock(), [detail] if detail else []
        self._done, self._total, self._count = 0, 0, ""
        self._expected_end: float | None = None

    def advance(self, done: int, total: int, count: str, facts: list[str]) -> None:
        self._done, self._total, self._count, self._facts = done, total, count, facts

    def trained(self, record: Record, total: int) -> None:
        """The end is expected by the median of the recent steps' seconds."""
        self._seconds.append(record["step_seconds"])
        left = (total - record["step"]) * statistics.median(self._seconds)
        self._expected_end = self._clock() + left
        if record["loss"] is not None:
            self._losses.append((record["step"], record["loss"]))
        count = f"step {record['step']:>{len(f'{total:,}')},}/{total:,}"
        self.advance(record["step"], total, count, rates(record))

    def evaluated(self, record: Record) -> None:
        first = self._perplexity.get(record["source"], (record["perplexity"],))[0]
        self._perplexity[record["source"]] = first, record["perplexity"]

    def rewind(self, step: int) -> None:
        """The steps after `step` are taken back."""
        self._losses = [(at, loss) for at, loss in self._losses if at <= step]
        self._seconds.clear()
        self._expected_end = None

    def remaining_seconds(self) -> float | None:
        return None if self._expected_end is None else max(0.0, self._expected_end - self._clock())

    def __rich__(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._losses:
            loss, curve = number(self._losses[-1][1]), sparkline([loss for _, loss in self._losses])
            lines.append(Text.assemble(("loss ", "dim"), (loss, "bold"), "  ", (curve, "cyan")))
        if self._facts:
            lines.append(Text("  ".join(self._facts), style="dim"))
        if self._perplexity:
            lines.append(self._evaluations())
        return Group(self._head(), Padding(Group(*lines), (0, 0, 0, 2)))

    def _head(self) -> RenderableType:
        title = Text.assemble((self._name, "bold"), " " if self._name else "", self._phase)
        row = Table.grid(padding=(0, 1), expand=bool(self._total))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        cells: list[RenderableType] = [self.mark, title]
        if self._total:
            row.add_column(ratio=1)
            cells.append(ProgressBar(self._total, self._done, complete_style="cyan", finished_style="cyan"))
        for text in (Text(self._count), Text(self._clock_text(), style="dim")):
            row.add_column(no_wrap=True, justify="right")
            cells.append(text)
        row.add_row(*cells)
        return row

    def _clock_text(self) -> str:
        remaining = None if isinstance(self.mark, Text) else self.remaining_seconds()
        elapsed = duration(self._clock() - self._began)
        return elapsed if remaining is None else f"{elapsed}  ETA {duration(remaining)}"

    def _evaluations(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for source, (first, last) in self._perplexity.items():
            change = f"{100 * (last / first - 1):+.1f} %" if first and last != first else ""
            shown = f"{number(first)} → {number(last)}" if change else number(last)
            colour = "green" if last < first else "yellow"
            table.add_row(Text("perplexity", "dim"), Text(source), Text(shown, "bold"), Text(change, colour))
        return table


def rates(record: Record) -> list[str]:
    """Throughput and cost of a step, in words."""
    mfu, seconds = record["mfu"], record["step_seconds"]
    return [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        "MFU n/a" if mfu is None else f"MFU {100 * mfu:.0f}%",
        f"data wait {100 * record['data_wait_seconds'] / seconds if seconds else 0:.1f}%",
        f"memory {record['memory_bytes'] / 1e9:.1f} GB",
        f"lr {record['learning_rate']:.1e}",
    ]


def sparkline(values: list[float]) -> str:
    """The whole curve in at most CURVE_POINTS characters, each the mean of its part."""
    count = min(len(values), CURVE_POINTS)
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (mean - low) / (high - low or 1))] for mean in means)


def duration(seconds: float) -> str:
    """1:02 for 62 seconds, 1:01:02, 2 d 03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float | None) -> str:
    """Four figures or so: 4012, 45.21, 3.142."""
    if value is None or value != value:
        return "n/a"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def clean(text: str) -> str:
    """Without escape sequences and control characters: a message may quote anything."""
    return _CONTROL.sub("", text)
