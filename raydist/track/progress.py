"""What a person sees during a run: a live view in a terminal, plain lines elsewhere.

records, phases ──> View ──┬──> LiveView    a bar, and figures that change in place
                           └──> Lines       a line for each step, evaluation and message
"""

from __future__ import annotations

import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from raydist.track.humanize import clean, duration, number, workers
from raydist.track.listener import Listener
from raydist.track.records import Record

PREPARE_SECONDS = 5.0
"""Shortest time between two lines about preparation."""

RECENT_RECORDS = 20
COLUMNS = (
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(None, style="bright_black", complete_style="cyan", finished_style="cyan"),
    progress.TextColumn("{task.fields[count]}", markup=False),
    progress.TimeElapsedColumn(),
    progress.TextColumn("{task.fields[expected]}", style="dim"),
)


def make_view(stream: TextIO | None = None, *, name: str = "") -> View:
    """A live view if `stream` (default: stderr) is a terminal that can show one, else lines.

    name: the name of the run.
    """
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")

    def say(text: str) -> None:
        stream.write(text + "\n")
        stream.flush()

    return LiveView(console, name) if live else Lines(say)


class View(Listener, ABC):
    """Shows records. The ETA assumes the median duration of recent steps."""

    def __init__(self) -> None:
        self._total_steps = 0
        self._seconds: deque[float] = deque(maxlen=RECENT_RECORDS)

    def record(self, record: Record) -> None:
        self._total_steps = record.get("steps", self._total_steps)
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

    def _train(self, record: Record) -> None:
        step, total = record["step"], max(self._total_steps, record["step"])
        self._seconds.append(record["step_seconds"])
        facts = "  ".join([f"loss {number(record['loss'])}", *rates(record)])
        left = (total - step) * statistics.median(self._seconds)
        self._step(step, total, facts, f"ETA {duration(left)}")

    @abstractmethod
    def _step(self, step: int, total: int, facts: str, expected: str) -> None: ...

    @abstractmethod
    def _evaluation(self, step: int, source: str, perplexity: float) -> None: ...


class Lines(View):
    """Passes plain lines, without control characters or newline, to `say`."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._say, self._clock = say, clock
        self._last_prepared = -float("inf")

    def phase(self, name: str, detail: str = "") -> None:
        self.message(f"{name}: {detail}" if detail else name)

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        now = self._clock()
        if done == total or now - self._last_prepared >= PREPARE_SECONDS:
            self._last_prepared = now
            self.message(f"slice {done:,}/{total:,}  {documents:,} documents  {tokens:,} tokens")

    def message(self, text: str) -> None:
        self._say(clean(text))

    def _step(self, step: int, total: int, facts: str, expected: str) -> None:
        self.message(f"step {step:,}/{total:,}  {facts}  {expected}")

    def _evaluation(self, step: int, source: str, perplexity: float) -> None:
        self.message(f"eval  step {step:,}  {source}  perplexity {number(perplexity)}")


class LiveView(View):
    """A progress bar and lines of figures below it; anything else that is printed appears above them."""

    def __init__(self, console: Console, name: str = "") -> None:
        super().__init__()
        self._name = name
        self._first_perplexity: dict[str, float] = {}
        self._bar = _Bar(console)
        self._begin("starting")

    def __enter__(self) -> LiveView:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, name: str, detail: str = "") -> None:
        self._begin(name, detail)

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        facts = f"{documents:,} documents  {tokens:,} tokens"
        self._advance(done, total, f"slice {done:,}/{total:,}", facts)

    def trials(self, done: int, total: int, best: float) -> None:
        self._advance(done, total, f"trial {done:,}/{total:,}", f"best {number(best)} bits per byte")

    def message(self, text: str) -> None:
        self._bar.print(clean(text), markup=False, soft_wrap=True)

    def _step(self, step: int, total: int, facts: str, expected: str) -> None:
        self._advance(step, total, f"step {step:,}/{total:,}", facts, expected)

    def _evaluation(self, step: int, source: str, perplexity: float) -> None:
        """The first perplexity, the last, and the change between them."""
        first, last = self._first_perplexity.setdefault(source, perplexity), perplexity
        change = f"{number(first)} → {number(last)}  {100 * (last / first - 1):+.1f} %" if first else ""
        self._bar.figures[source] = f"perplexity  {source}  {number(last) if last == first else change}"

    def _begin(self, phase: str, detail: str = "") -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.figures[""] = detail
        self._task = self._bar.add_task(f"{self._name} {phase}".strip(), total=None, count="", expected="")

    def _advance(self, done: int, total: int, count: str, facts: str, expected: str = "") -> None:
        self._bar.figures[""] = facts
        self._bar.update(self._task, completed=done, total=total, count=count, expected=expected)


class _Bar(progress.Progress):
    """The progress bar, with a line for each non-empty text of `figures` below it."""

    def __init__(self, console: Console) -> None:
        self.figures: dict[str, str] = {}
        # redirect what else is printed to this terminal, but not output that is piped elsewhere
        out, err = sys.stdout.isatty(), sys.stderr.isatty()
        super().__init__(*COLUMNS, console=console, redirect_stdout=out, redirect_stderr=err)
        self.expand, self.live.refresh_per_second = True, 4

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(f"  {clean(figure)}") for figure in list(self.figures.values()) if figure)


def rates(record: Record) -> list[str]:
    """Throughput and cost of a step, a text each."""
    mfu, seconds = record["mfu"], record["step_seconds"]
    return [
        f"{record['tokens_per_second']:,.0f} tokens/s",
        "MFU n/a" if mfu is None else f"MFU {100 * mfu:.0f}%",
        f"data wait {100 * record['data_wait_seconds'] / seconds if seconds else 0:.1f}%",
        f"memory {record['memory_bytes'] / 1e9:.1f} GB",
        f"lr {record['learning_rate']:.1e}",
    ]
