"""The report: one self-contained page of a run, from its folder alone; also of one that failed early."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydist import files
from raydist.folder import RunFolder
from raydist.track.humanize import date, duration, number, short, shown, workers
from raydist.track.plots import Curve, draw, smoothed
from raydist.track.records import HISTORY, Record, evaluations, read_metrics, redact, supersede

MOST_POINTS = 2000


def write_report(run: RunFolder, *, state: str = "", error: str = "") -> Path:
    """Write the run's report. `state` and `error` stand for those of a status that is not written yet."""
    files.write_text(run.report, render(run, state=state, error=error))
    return run.report


def render(run: RunFolder, *, state: str = "", error: str = "") -> str:
    """The page as text, without the parts that the folder knows nothing of."""
    status, recorded = run.status(), read_metrics(run)
    records = supersede(recorded)
    train = [record for record in records if record["kind"] == "train"]
    return page(
        "report.html.j2",
        run,
        state=state or status.get("state", "not started"),
        error=error or status.get("error", ""),
        train=train,
        tokens_per_second=statistics.median([r["tokens_per_second"] for r in train] or [0]),
        seconds=wall_seconds(recorded) if recorded else None,
        evaluations=evaluations(records),
        plots=_plots(train, evaluations(records)),
        history=[record for record in records if record["kind"] in HISTORY],
        data=dict.fromkeys(("sources", "packing", "sample", "audit", "parameters")) | run.data(),
    )


def page(template: str, folder: RunFolder, *, error: str, **content: Any) -> str:
    """A page of `folder`, with its job; credentials are blanked out."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raydist.track", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (date, duration, number, redact, short, shown, workers)
    environment.filters.update({f.__name__: f for f in filters})
    job = folder.job_file
    return environment.get_template(template).render(
        name=folder.path.resolve().name,
        error=redact(error),
        job=redact(job.read_text()) if job.exists() else "",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        **content,
    )


def wall_seconds(recorded: Sequence[Record]) -> float:
    """From the first to the last record of each attempt, summed: the time between attempts is not counted."""
    times: dict[int, list[float]] = {}
    for record in recorded:
        if "time" in record:
            times.setdefault(record.get("attempt", 0), []).append(record["time"])
    return sum(max(of_attempt) - min(of_attempt) for of_attempt in times.values())


def _plots(train: Sequence[Record], evaluated: dict[str, list[Record]]) -> list[str]:
    """ "" for what was not recorded at all."""
    train = [record | {"data_wait": _data_wait(record)} for record in train]
    perplexity = [_curve(of, "perplexity", source) for source, of in evaluated.items()]
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
    """Percent of the step's time."""
    wait, seconds = record.get("data_wait_seconds"), record.get("step_seconds")
    return 100 * wait / seconds if wait is not None and seconds else None
