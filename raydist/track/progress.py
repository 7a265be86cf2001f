"""What a person sees while a run goes on: a calm live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from raydist.track.humanize import clean, duration, number, workers
from raydist.track.records import Record

PREPARE_SECONDS = 5.0
"""Least time between plain lines of preparation."""

RECENT_RECORDS = 20
COLUMNS = (
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(None, style="bright_black", complete_style="cyan", finished_style="cyan"),
    progress.TextColumn("{task.fields[count]}", markup=False),
    progress.TimeElapsedColumn(),
    progress.TextColumn("{task.fields[expected]}", style="dim"),
)


class Progress(progress.Progress):
    """Use as a context manager. With a terminal, whatever else is printed appears above the live view.

    The view is a line of progress, then figures. `total_steps` is set when it is known.
    """

    def __init__(
        self, stream: TextIO | None = None, *, name: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self._name, self._clock = 0, name, clock
        self._figures: dict[str, str] = {}
        self._first_perplexity: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT_RECORDS)
        self._last_prepared = -float("inf")
        self._stream = stream or sys.stderr
        console = Console(file=self._stream, highlight=False)
        fits = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        # also catches what else is printed to this terminal, but not what is piped elsewhere
        out, err = sys.stdout.isatty(), sys.stderr.isatty()
        super().__init__(
            *COLUMNS, console=console, redirect_stdout=out, redirect_stderr=err, disable=not fits
        )
        self.expand, self.live.refresh_per_second = True, 4
        self._begin("starting")

    def phase(self, name: str, detail: str = "") -> None:
        """Say what is done now: planning, preparing, training, ..."""
        self._begin(name, detail)
        self._plain(f"{name}: {detail}" if detail else name)

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        """`done` of `total` slices; what is in them so far."""
        count, facts = f"slice {done:,}/{total:,}", f"{documents:,} documents  {tokens:,} tokens"
        self._advance(done, total, count, facts)
        now = self._clock()
        if done == total or now - self._last_prepared >= PREPARE_SECONDS:
            self._last_prepared = now
            self._plain(f"{count}  {facts}")

    def trials(self, done: int, total: int, best: float) -> None:
        """`done` of `total` trials of a sweep; the least bits per byte so far."""
        self._advance(done, total, f"trial {done:,}/{total:,}", f"best {number(best)} bits per byte")

    def record(self, record: Record) -> None:
        """Show one record of metrics.jsonl."""
        kind = record.get("kind")
        if kind == "train":
            self._train(record)
        elif kind == "eval":
            self._evaluation(record["step"], record["source"], record["perplexity"])
        elif kind == "incident":
            self.message(f"incident: {record.get('what', '')}")
        elif kind == "resume":
            self._seconds.clear()
            self.message(f"resumed at step {record['step']:,} with {workers(record.get('world_size', 1))}")

    def message(self, text: str) -> None:
        """A lasting line."""
        if not self.disable:
            self.print(clean(text), markup=False, soft_wrap=True)
        self._plain(text)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(f"  {clean(figure)}") for figure in list(self._figures.values()) if figure)

    def _begin(self, phase: str, detail: str = "") -> None:
        for task in self.task_ids:
            self.remove_task(task)
        self._figures[""] = detail
        self._task = self.add_task(f"{self._name} {phase}".strip(), total=None, count="", expected="")

    def _advance(self, done: int, total: int, count: str, facts: str, expected: str = "") -> None:
        self._figures[""] = facts
        self.update(self._task, completed=done, total=total, count=count, expected=expected)

    def _train(self, record: Record) -> None:
        """The end is expected by the median of the recent steps' seconds."""
        step, total = record["step"], max(self.total_steps, record["step"])
        self._seconds.append(record["step_seconds"])
        count, loss = f"step {step:,}/{total:,}", f"loss {number(record['loss'])}"
        expected = f"ETA {duration((total - step) * statistics.median(self._seconds))}"
        facts = "  ".join([loss, *rates(record)])
        self._advance(step, total, count, facts, expected)
        self._plain(f"{count}  {facts}  {expected}")

    def _evaluation(self, step: int, source: str, last: float) -> None:
        first = self._first_perplexity.setdefault(source, last)
        change = f"{number(first)} → {number(last)}  {100 * (last / first - 1):+.1f} %" if first else ""
        shown = number(last) if last == first else change
        self._figures[source] = f"perplexity  {source}  {shown}"
        self._plain(f"eval  step {step:,}  {source}  perplexity {number(last)}")

    def _plain(self, text: str) -> None:
        if self.disable:
            self._stream.write(clean(text) + "\n")
            self._stream.flush()


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
