"""What a person sees during a run: a live view in a terminal, plain lines elsewhere.

records, phases ──> View ──┬──> Lines       a line for each step, evaluation, phase and message
                           └──> LiveView    such lines, and below them a bar of the phase that runs
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TextIO

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

from raydist.track.humanize import clean, duration, number, segment, skip, tried, workers
from raydist.track.listener import Listener
from raydist.track.records import Record, evaluations, supersede

LINE_SECONDS = 5.0
"""Shortest time between two lines about the progress of a phase."""

DOING = {
    "load": "loading the model",
    "compile": "compiling",
    "first_step": "training",
    "steps": "training",
    "evaluation": "evaluating",
    "checkpoint": "checkpointing",
    "export": "exporting",
}
"""The phases of an attempt, as people read them; any other is called by its own name."""

AGAIN_AND_AGAIN = ("training", "evaluating", "checkpointing")
"""These alternate. As lines they would drown the steps, so only one that lasts is mentioned."""

COUNTED = {"training": "step {}", "evaluating": "{} tokens", "packing": "{} shards"}

RECENT_RECORDS = 20


class Elapsed(progress.ProgressColumn):
    """Time since the phase began, which goes on also where all of it is done."""

    max_refresh = 0.5

    def render(self, task: progress.Task) -> Text:
        return Text(duration(time.monotonic() - task.fields["since"]), style="progress.elapsed")


COLUMNS = (
    progress.TextColumn("{task.description}", markup=False),
    progress.BarColumn(None, style="bright_black", complete_style="cyan", finished_style="cyan"),
    progress.TextColumn("{task.fields[count]}", markup=False),
    Elapsed(),
    progress.TextColumn("{task.fields[expected]}", style="dim"),
)


def make_view(stream: TextIO | None = None, *, name: str = "", plain: bool = False) -> View:
    """A live view if `stream` (default: stderr) is a terminal that can show one, else lines.

    name: the name of the run.  plain: lines in any case.
    """
    stream = stream or sys.stderr
    console = Console(file=stream, highlight=False)
    capable = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")

    def say(text: str) -> None:
        stream.write(text + "\n")
        stream.flush()

    return LiveView(console, name) if capable and not plain else Lines(say)


class View(Listener):
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
        elif kind == "skip":
            self.message(skip(record))
        elif kind == "segment":
            self.message(segment(record))
        elif kind == "incident":
            self.message(f"incident: {record.get('what', '')}")
        elif kind == "resize":
            self.message(f"workers: {record.get('from')} before, {record.get('to')} now")
        elif kind == "resume":
            self._seconds.clear()
            why = f": {record['why']}" if record.get("why") else ""
            self.message(
                f"resumed at step {record['step']:,} with {workers(record.get('world_size', 1))}{why}"
            )
        if text := tried(record):
            self.message(f"micro batches of {record['micro_batch_size']} sequences, {text}")

    def _train(self, record: Record) -> None:
        step, total = record["step"], max(self._total_steps, record["step"])
        self._seconds.append(record["step_seconds"])
        facts = "  ".join([f"loss {number(record['loss'])}", *rates(record)])
        left = (total - step) * statistics.median(self._seconds)
        self._step(step, total, facts, f"ETA {duration(left)}")

    def _step(self, step: int, total: int, facts: str, expected: str) -> None:
        self.message(f"step {step:,}/{total:,}  {facts}  {expected}")

    def _evaluation(self, step: int, source: str, perplexity: float) -> None:
        self.message(f"eval  step {step:,}  {source}  perplexity {number(perplexity)}")


class Lines(View):
    """Passes plain lines, without control characters or newline, to `say`."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._say, self._clock = say, clock
        self._doing, self._last = "", -math.inf

    def __enter__(self) -> Lines:
        if not self._doing:
            self.phase("starting")
        return self

    def phase(self, name: str, detail: str = "") -> None:
        self._doing, self._last = name, -math.inf
        self.message(f"{name}: {detail}" if detail else name)

    def progress(self, name: str, done: int, total: int) -> None:
        doing, now = DOING.get(name, name), self._clock()
        if doing != self._doing:
            self._doing, self._last = doing, now
            if doing not in AGAIN_AND_AGAIN:
                self.message(doing)
        elif doing != "training" and total and now - self._last >= LINE_SECONDS:
            self._last = now
            self.message(f"{doing}  {_count(doing, done, total)}")

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        now = self._clock()
        if done == total or now - self._last >= LINE_SECONDS:
            self._last = now
            self.message(f"slice {done:,}/{total:,}  {documents:,} documents  {tokens:,} tokens")

    def message(self, text: str) -> None:
        self._say(clean(text))


class LiveView(View):
    """A progress bar of the phase and figures below it; lines, and what else is printed, stay above them."""

    def __init__(self, console: Console, name: str = "") -> None:
        super().__init__()
        self._name = name
        self._first_perplexity: dict[str, float] = {}
        self._expected, self._training_since = "", 0.0
        self._bar = _Bar(console)
        self._begin("starting")

    def __enter__(self) -> LiveView:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def history(self, records: Sequence[Record]) -> None:
        """The baseline of a resumed run is its first evaluation, which another driver saw."""
        for source, evaluated in evaluations(supersede(records)).items():
            self._first_perplexity.setdefault(source, evaluated[0]["perplexity"])

    def phase(self, name: str, detail: str = "") -> None:
        self._begin(name, detail)

    def progress(self, name: str, done: int, total: int) -> None:
        doing = DOING.get(name, name)
        if doing != self._doing:
            self._begin(doing)
        if total:
            self._advance(done, total, _count(doing, done, total))

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        facts = f"{documents:,} documents  {tokens:,} tokens"
        self._advance(done, total, f"slice {done:,}/{total:,}", facts)

    def trials(self, done: int, total: int, best: float) -> None:
        self._advance(done, total, f"trial {done:,}/{total:,}", f"best {number(best)} bits per byte")

    def message(self, text: str) -> None:
        self._bar.print(clean(text), markup=False, soft_wrap=True)

    def _step(self, step: int, total: int, facts: str, expected: str) -> None:
        super()._step(step, total, facts, expected)
        self._expected = expected
        if self._doing == "training":
            self._advance(step, total, _count("training", step, total))

    def _evaluation(self, step: int, source: str, perplexity: float) -> None:
        """The first perplexity, the last, and the change between them."""
        super()._evaluation(step, source, perplexity)
        first, last = self._first_perplexity.setdefault(source, perplexity), perplexity
        change = f"{number(first)} → {number(last)}  {100 * (last / first - 1):+.1f} %" if first else ""
        self._bar.figures[source] = f"perplexity  {source}  {number(last) if last == first else change}"

    def _begin(self, phase: str, detail: str = "") -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.figures[""], self._doing = detail, phase
        since = time.monotonic()
        if phase == "training":  # its clock goes on after an evaluation or a checkpoint
            self._training_since = since = self._training_since or since
        self._task = self._bar.add_task(
            f"{self._name} {phase}".strip(), total=None, count="", expected="", since=since
        )

    def _advance(self, done: int, total: int, count: str, facts: str = "") -> None:
        self._bar.figures[""] = facts
        expected = self._expected if self._doing == "training" else ""
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


def _count(doing: str, done: int, total: int) -> str:
    """How much of a phase is done, in its unit: step 10/40."""
    return COUNTED.get(doing, "{}").format(f"{done:,}/{total:,}")


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
