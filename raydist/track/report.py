"""report.html: one self-contained page of a run, from its folder alone; also of one that failed early."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydist import files
from raydist.folder import RunFolder
from raydist.track.plots import plots
from raydist.track.progress import duration, number, workers
from raydist.track.records import Record, evaluations, read_metrics, redact, supersede


@dataclass(frozen=True)
class Evaluation:
    """First and last evaluation of one source."""

    source: str
    first: Record
    last: Record

    @property
    def change(self) -> float:
        """Of the perplexity, in percent; less is better."""
        before, after = self.first.get("perplexity"), self.last.get("perplexity")
        return 100 * (after / before - 1) if before and after is not None else 0.0


def write_report(run: Path, *, state: str = "", error: str = "") -> Path:
    """Write `run`/report.html. `state` and `error` stand for those of a status.json not yet written."""
    page = RunFolder(run).report
    files.write_text(page, render(run, state=state, error=error))
    return page


def render(run: Path, *, state: str = "", error: str = "") -> str:
    """The page as text; a part that the folder does not know of is left out."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raydist.track", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=number, short=short, size=size, date=date)
    return environment.get_template("report.html.j2").render(**_content(run, state, error))


def _content(run: Path, state: str, error: str) -> dict[str, Any]:
    folder, recorded = RunFolder(run), read_metrics(run)
    records, status, job = supersede(recorded), folder.status(), folder.job_file
    data = {"sources": {}, "packing": None, "sample": None, "audit": None} | folder.data()
    return {
        "name": run.resolve().name,
        "state": state or status.get("state", "not started"),
        "error": redact(error or status.get("error", "")),
        "facts": _facts(recorded, records, data),
        "evaluations": [Evaluation(name, of[0], of[-1]) for name, of in evaluations(records).items()],
        "plots": plots(records),
        "data": data,
        "parts": _parts(data.get("audit")),
        "attempts": _attempts(records),
        "job": redact(job.read_text()) if job.exists() else "",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def _facts(
    recorded: Sequence[Record], records: Sequence[Record], data: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the headline. `recorded` has the lost attempts too."""
    train = [r for r in records if r["kind"] == "train"]
    facts = []
    if train:
        last = train[-1]
        speed = statistics.median(r["tokens_per_second"] for r in train)
        facts.append(("Steps", f"{last['step']:,}", f"{last['samples']:,} sequences"))
        facts.append(("Tokens seen", short(last["tokens_seen"]), f"{last['tokens_seen']:,}"))
        facts.append(("Last loss", number(last["loss"]), "nats per token"))
        facts.append(("Throughput", short(speed), "tokens per second, median"))
    if recorded:
        facts.append(("Wall time", duration(wall_seconds(recorded)), "while training"))
    if parameters := data.get("parameters"):
        all_of_them = parameters["trainable"] == parameters["total"]
        remark = "all trained" if all_of_them else f"{short(parameters['trainable'])} trained"
        facts.append(("Parameters", short(parameters["total"]), remark))
    return facts


def wall_seconds(recorded: Sequence[Record]) -> float:
    """From the first to the last record of each attempt, summed: the time between attempts is not counted."""
    times: dict[int, list[float]] = {}
    for record in recorded:
        if "time" in record:
            times.setdefault(record.get("attempt", 0), []).append(record["time"])
    return sum(max(of_attempt) - min(of_attempt) for of_attempt in times.values())


def _attempts(records: Sequence[Record]) -> list[tuple[str, str, bool]]:
    """(when, what, is an incident) of starts, resumes and incidents, in order."""
    rows = []
    for record in records:
        when = date(record.get("time"))
        if record["kind"] in ("start", "resume"):
            begun = "started" if record["kind"] == "start" else f"resumed at step {record.get('step', 0):,}"
            text = f"Attempt {record.get('attempt', 1)} {begun} with {workers(record.get('world_size', 1))}"
            rows.append((when, text, False))
        elif record["kind"] == "incident":
            rows.append((when, redact(str(record.get("what", ""))), True))
    return rows


def _parts(audit: dict[str, int] | None) -> list[tuple[str, str, int, float]]:
    """(css class, name, tokens, percent of the tokens in)."""
    if not audit or not audit["n_in"]:
        return []
    named = (("trained", "n_trained"), ("held out", "n_held_out"), ("left", "n_left"))
    total = audit["n_in"]
    return [(name.replace(" ", "-"), name, audit[key], 100 * audit[key] / total) for name, key in named]


def short(count: float) -> str:
    """1.97M, 12.6k, 840: three figures."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g}{letter}" if count < 999.5 * unit else f"{count / unit:,.0f}{letter}"
    return f"{count:,.0f}"


def size(n_bytes: float) -> str:
    return f"{short(n_bytes).replace('B', 'G')}B"


def date(seconds: float | None) -> str:
    """UTC, to the second."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
