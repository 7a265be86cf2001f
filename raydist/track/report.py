"""The report: one self-contained page from the folder of a run, even of one that failed early."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydist import files
from raydist.folder import RunFolder
from raydist.track.humanize import date, duration, number, short, shown, size, workers
from raydist.track.plots import Curve, draw, smoothed
from raydist.track.records import (
    HISTORY,
    Record,
    evaluations,
    phase_seconds,
    read_metrics,
    redact,
    supersede,
)

MOST_POINTS = 2000


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
        tokens_per_second=statistics.median([r["tokens_per_second"] for r in train] or [0]),
        mfu=statistics.median([r["mfu"] for r in train if r.get("mfu") is not None] or [0]),
        phases=phase_seconds(written),
        seconds=wall_seconds(written) if written else None,
        evaluations=evaluations(records),
        plots=_plots(train, evaluations(records)),
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
    filters = (date, duration, number, redact, short, shown, size, workers)
    environment.filters.update({f.__name__: f for f in filters})
    job = folder.job_file
    return environment.get_template(template).render(
        name=folder.path.resolve().name,
        error=redact(error),
        job=redact(job.read_text()) if job.exists() else "",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        **content,
    )


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


def _curve(records: Sequence[Record], key: str, name: str = "") -> Curve:
    thin = records[:: max(1, len(records) // MOST_POINTS)]
    return Curve(name or key, [r["step"] for r in thin], [r.get(key) for r in thin])


def _data_wait(record: Record) -> float | None:
    """Waiting for data, in percent of the step's time."""
    wait, seconds = record.get("data_wait_seconds"), record.get("step_seconds")
    return 100 * wait / seconds if wait is not None and seconds else None
