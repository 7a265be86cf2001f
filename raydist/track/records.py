"""Read a run's records: while they are written (`Tail`), and as one history of all attempts (`effective`).

`phase_seconds` adds up where a run's time went. `figures` and `flatten` turn a record and a job into the
names and values that trackers show.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from raydist.folder import RunFolder
from raydist.redact import redact, redacted
from raydist.sealed import opened
from raydist.training.phases import PHASES

Record = dict[str, Any]


class EvalRecord(TypedDict):
    """An evaluation of one source. eval_loss: nats per label. None stands for what is no number.

    gain, forgetting: how much lower, or for a replayed source higher, eval_loss is than before training; only
    in runs that have replayed sources.
    """

    kind: str
    attempt: int
    time: float
    step: int
    source: str
    eval_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    n_tokens: int
    n_bytes: int
    n_documents: int
    gain: NotRequired[float]
    forgetting: NotRequired[float]


HISTORY = frozenset({"start", "resume", "resize", "stage", "segment", "incident"})
"""Kinds of records that are kept even when their steps are trained again."""

_NUMBERS = frozenset(
    {
        "step",
        "steps",
        "attempt",
        "time",
        "loss",
        "samples",
        "tokens_seen",
        "learning_rate",
        "grad_norm",
        "mfu",
    }
    | {"tokens_per_second", "data_wait_seconds", "step_seconds", "perplexity", "bits_per_byte", "eval_loss"}
    | {"gain", "forgetting"}
)
"""Values that readers take for numbers, or null."""

_OF_A_SKIP = ("step", "action", "reason", "first_sample", "end_sample", "documents")
_NEEDED = {
    "train": ("step",),
    "eval": ("step", "source", "perplexity"),
    "phases": ("seconds",),
    "skip": _OF_A_SKIP,
}
"""Values that readers of this kind of record take for granted."""

NOT_FIGURES = frozenset({"step", "attempt", "time"})


class Tail:
    """The records appended to a file since the last `poll`. offset: the byte where the next one starts."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def poll(self) -> list[Record]:
        """New records in order; [] if there is no file. A last line without a newline is left for later."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            self.offset = self.offset if self.offset <= size else 0  # the file was replaced by a new one
            stream.seek(self.offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return [record for line in whole.split(b"\n") if (record := _parse(line)) is not None]


def read_metrics(run: RunFolder) -> list[Record]:
    """Every record of the run, including lost attempts, in the order written."""
    return Tail(run.metrics_file).poll()


def effective(run: RunFolder) -> list[Record]:
    """The run's history over all attempts; steps that were trained again appear once, as the last attempt
    recorded them."""
    return supersede(read_metrics(run))


def supersede(records: Iterable[Record]) -> list[Record]:
    """Keep for each (kind, step, source) the newest record.

    An attempt that begins at step s removes the later steps of the attempts before it. Records of the
    HISTORY kinds all stay.
    """
    kept: dict[tuple[Any, ...], Record] = {}
    for place, record in enumerate(sorted(records, key=lambda record: record.get("attempt", 0))):
        kind, step = record["kind"], record.get("step", 0)
        if kind in ("start", "resume"):
            kept = {k: old for k, old in kept.items() if old["kind"] in HISTORY or old.get("step", 0) <= step}
        key = (kind, place) if kind in HISTORY else (kind, step, record.get("source"))
        kept.pop(key, None)  # so that the newer record moves to the end
        kept[key] = record
    return list(kept.values())


def evaluations(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Source -> its evaluations, in order."""
    by_source: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "eval":
            by_source.setdefault(record["source"], []).append(record)
    return by_source


def gained_and_forgotten(records: Iterable[Record]) -> dict[str, float]:
    """{gain, forgetting}: means over the sources to learn and over the replayed ones at the last evaluation,
    in nats per label; {} for a run without replayed sources.
    """
    last = [of[-1] for of in evaluations(records).values()]
    found = {name: [r[name] for r in last if r.get(name) is not None] for name in ("gain", "forgetting")}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def phase_seconds(written: Iterable[Record]) -> dict[str, float]:
    """Seconds by phase over all attempts, lost ones too; {} where none is recorded. written: all records.

    An attempt that was killed recorded none.
    """
    total: dict[str, float] = {}
    for record in written:
        if record["kind"] == "phases":
            for name, spent in record["seconds"].items():
                total[name] = total.get(name, 0.0) + spent
    order = {name: place for place, name in enumerate(PHASES)}
    return dict(sorted(total.items(), key=lambda item: order.get(item[0], len(order))))


def figures(record: Record) -> dict[str, float]:
    """The metrics of a step or an evaluation: loss, eval/<source>/perplexity, ...; {} for other kinds."""
    if record["kind"] not in ("train", "eval"):
        return {}
    prefix = f"eval/{record['source']}/" if record["kind"] == "eval" else ""
    values = ((n, v) for n, v in record.items() if n not in NOT_FIGURES and isinstance(v, int | float))
    return {key(prefix + name.removeprefix("eval_")): float(value) for name, value in values}


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """{"train": {"lr": 0.1}} -> {"train.lr": "0.1"}; lists as JSON, credentials in URIs replaced by ***."""
    if isinstance(value, dict) and value:
        named = redacted(value).items()
        pairs = (flatten(inner, f"{path}.{name}" if path else str(name)) for name, inner in named)
        return {name: text for part in pairs for name, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {key(path): redact(text)[:6000]}


def key(name: str) -> str:
    """`name` with the characters that MLflow allows: letters, digits, space and _ - . /"""
    return re.sub(r"[^\w\-. /]", "_", name)


def _parse(line: bytes) -> Record | None:
    """None for a line that is no record: a killed writer left it incomplete, or something else wrote it."""
    try:
        record = opened(line)
    except ValueError:
        return None
    return record if _is_record(record) else None


def _is_record(record: Record) -> bool:
    kind = record.get("kind")
    if not isinstance(kind, str) or any(record.get(name) is None for name in _NEEDED.get(kind, ())):
        return False
    if not isinstance(record.get("source", ""), str) or not isinstance(record.get("seconds", {}), dict):
        return False
    return all(isinstance(record.get(name) or 0, int | float) for name in _NUMBERS)
