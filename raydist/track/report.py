"""The report: one self-contained page from the folder of a run, even of one that failed early."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from raydist import files
from raydist.folder import RunFolder
from raydist.redact import redact
from raydist.track.ettr import effective_time
from raydist.track.humanize import date, duration, number, segment, short, shown, size, tried, workers
from raydist.track.plots import Curve, draw, smoothed
from raydist.track.records import (
    HISTORY,
    Record,
    evaluations,
    gained_and_forgotten,
    phase_seconds,
    read_metrics,
    supersede,
)

MOST_POINTS = 2000
REWRITE_SECONDS = 30.0
"""Shortest time between two reports of a run that trains."""

LARGEST_SHARE = 0.02
"""Writing reports takes at most this share of one CPU's time."""


class LiveReport:
    """Writes the report again while the run goes on: a Sink, which a Tracker calls when there is news.

    ended: from then on it writes none, since the last report is written by who knows how the run ended.
    """

    def __init__(self, run: RunFolder, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._next = clock()
        self.offset, self.ended = 0, False

    def send(self, records: list[Record], offset: int) -> None:
        self.offset, began = offset, self._clock()
        if self.ended or began < self._next:
            return
        write_report(self._run)
        self._next = began + max(REWRITE_SECONDS, (self._clock() - began) / LARGEST_SHARE)

    def close(self, state: str) -> None:
        """Nothing is open between two reports."""


def write_report(run: RunFolder, *, state: str = "", error: str = "") -> Path:
    """Write the run's report. `state` and `error`: of the status, if that is not written yet."""
    files.write_text(run.report, render(run, state=state, error=error))
    return run.report


def render(run: RunFolder, *, state: str = "", error: str = "") -> str:
    """The page as text, with only the parts for which the folder has data."""
    status, written = run.status(), read_metrics(run)
    records = supersede(written)
    train = [record for record in records if record["kind"] == "train"]
    return page(
        "report.html.j2",
        run,
        state=state or status.get("state", "not started"),
        error=error or status.get("error", ""),
        train=train,
        tokens_per_second=statistics.median(
            [r["tokens_per_second"] for r in train if "tokens_per_second" in r] or [0]
        ),
        mfu=statistics.median([r["mfu"] for r in train if r.get("mfu") is not None] or [0]),
        phases=phase_seconds(written),
        seconds=wall_seconds(written) if written else None,
        effective=effective_time(written),
        about=_about(run, next((r for r in reversed(records) if r["kind"] in ("start", "resume")), {})),
        evaluations=evaluations(records),
        gained=gained_and_forgotten(records),
        plots=[*_plots(train, evaluations(records)), _workers(records)],
        skips=[record for record in records if record["kind"] == "skip"],
        history=[record for record in records if record["kind"] in HISTORY],
        data=dict.fromkeys(("sources", "packing", "sample", "audit", "parameters")) | run.data(),
    )


def page(template: str, folder: RunFolder, *, error: str, **content: Any) -> str:
    """A page of `folder`, with its job; credentials are replaced by ***."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raydist.track", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (date, duration, number, redact, segment, short, shown, size, tried, workers)
    environment.filters.update({f.__name__: f for f in filters})
    return environment.get_template(template).render(
        name=folder.path.resolve().name,
        error=redact(error),
        job=redact(_text(folder.job_file)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        **content,
    )


def _text(path: Path) -> str:
    """Empty where there is no such file, or no text in it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _about(run: RunFolder, begun: Record) -> dict[str, str]:
    """What the run trains, and on what. begun: the record of its newest attempt's start."""
    try:
        job = yaml.safe_load(redact(_text(run.job_file)))
    except yaml.YAMLError:
        job = None  # a damaged job; the records say what they know

    def asked(*keys: str) -> Any:
        value = job
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    base = asked("model", "base") or _text_of("random weights, {}", asked("model", "config", "model_type"))
    parts = [base, _text_of("a LoRA adapter of rank {}", asked("adapter", "r"))]
    parts.append(_text_of("the base frozen in {}", asked("quantization")))
    sources = asked("corpus", "sources") or {}
    strategy = [asked("strategy", "name"), _text_of("stage {}", asked("strategy", "stage"))]
    strategy.append("offloaded to host memory" if asked("strategy", "offload") == "cpu" else "")
    device = [begun.get("device_name"), str(begun.get("device", "")).upper()]
    threads = _text_of(f"{{}} thread{'s' * (begun.get('threads') != 1)} each", begun.get("threads"))
    told = {
        "Base": _joined(parts),
        "Sources": _joined(f"{name} ({shown(asked('corpus', 'sources', name, 'path'))})" for name in sources),
        "Devices": _joined(
            [f"{workers(begun['world_size'])} on {_joined(device, ' ')}", threads]
            if "device" in begun
            else []
        ),
        "Precision": _joined([begun.get("mixed_precision"), "TF32 products" if begun.get("tf32") else ""]),
        "Strategy": _joined(strategy),
        "Attention": _joined([begun.get("attention"), "layers compiled" if begun.get("compiled") else ""]),
        "Versions": _joined(f"{name} {of}" for name, of in (begun.get("versions") or {}).items()),
    }
    return {name: value for name, value in told.items() if value}


def _text_of(text: str, value: Any) -> str:
    """Empty for a value that is not there."""
    return text.format(value) if value else ""


def _joined(parts: Iterable[Any], by: str = ", ") -> str:
    return by.join(str(part) for part in parts if part)


def wall_seconds(written: Sequence[Record]) -> float:
    """The sum over attempts of the time from the first to the last record."""
    times: dict[int, list[float]] = {}
    for record in written:
        if "time" in record:
            times.setdefault(record.get("attempt", 0), []).append(record["time"])
    return sum(max(attempt) - min(attempt) for attempt in times.values())


def _plots(train: Sequence[Record], evaluated: dict[str, list[Record]]) -> list[str]:
    """The curves of a run; "" for a curve without any value."""
    train = [record | {"data_wait": _data_wait(record)} for record in train]
    perplexity = [_curve(evaluations, "perplexity", source) for source, evaluations in evaluated.items()]
    rate = "tokens per second"
    return [
        draw("Loss", "nats per token", smoothed(_curve(train, "loss")), "step"),
        draw("Held-out perplexity", "", perplexity, "step", log="y"),
        draw("Throughput", rate, smoothed(_curve(train, "tokens_per_second")), "step", zero=True),
        draw("Waiting for data", "% of step time", smoothed(_curve(train, "data_wait")), "step", zero=True),
        draw("Learning rate", "", [_curve(train, "learning_rate")], "step", zero=True),
        draw("Gradient norm", "before clipping", smoothed(_curve(train, "grad_norm")), "step", zero=True),
    ]


def _workers(records: Sequence[Record]) -> str:
    """Workers by step; "" for a run whose number of them never changed."""
    begun = [r for r in records if r["kind"] in ("start", "resume") and "world_size" in r]
    if len({r["world_size"] for r in begun}) < 2:
        return ""
    steps, counts = list[int](), list[float | None]()
    last = max(r.get("step", 0) for r in records)
    for record, end in zip(begun, [*(r["step"] for r in begun[1:]), last], strict=True):
        steps += [record["step"], end]
        counts += [record["world_size"]] * 2
    return draw("Workers", "", [Curve("workers", steps, counts)], "step", zero=True)


def _curve(records: Sequence[Record], key: str, name: str = "") -> Curve:
    thin = records[:: max(1, len(records) // MOST_POINTS)]
    return Curve(name or key, [r["step"] for r in thin], [r.get(key) for r in thin])


def _data_wait(record: Record) -> float | None:
    """Waiting for data, in percent of the step's time."""
    wait, seconds = record.get("data_wait_seconds"), record.get("step_seconds")
    return 100 * wait / seconds if wait is not None and seconds else None
