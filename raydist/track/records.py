"""Read a run's records: while they are written (`Tail`), and as one history of all attempts (`effective`).

`figures` and `flatten` name what is in a record and in a job as trackers show it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from raydist.folder import RunFolder

Record = dict[str, Any]

HISTORY = frozenset({"start", "resume", "stage", "incident"})
"""Kinds that happened, whatever was trained again afterwards."""

NOT_FIGURES = frozenset({"step", "attempt", "time"})

_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), "***@"),
    (re.compile(r"((?:password|secret|token|api_?key|access_?key|signature)=)[^&\s'\"]+", re.I), r"\1***"),
)


class Tail:
    """The records appended to a file since the last look; `offset` (bytes) is where the next look starts."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = path, offset

    def poll(self) -> list[Record]:
        """New whole records in order; [] while there is no file. A last line without its newline waits."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            self.offset = self.offset if self.offset <= size else 0  # the file was begun again
            stream.seek(self.offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return [record for line in whole.split(b"\n") if (record := _parse(line)) is not None]


def read_metrics(run: RunFolder) -> list[Record]:
    """Every record of the run, of lost attempts too, in the order written."""
    return Tail(run.metrics_file).poll()


def effective(run: RunFolder) -> list[Record]:
    """The run's one history in the order of attempts; what later ones did again replaces the first try."""
    return supersede(read_metrics(run))


def supersede(records: Iterable[Record]) -> list[Record]:
    """Keep for each (kind, step, source) the newest record.

    An attempt that begins at step s takes back the steps after s of the attempts before it. Starts,
    resumes and incidents are history: they all stay.
    """
    kept: dict[tuple[Any, ...], Record] = {}
    for place, record in enumerate(sorted(records, key=lambda record: record.get("attempt", 0))):
        kind, step = record["kind"], record.get("step", 0)
        if kind in ("start", "resume"):
            kept = {k: old for k, old in kept.items() if old["kind"] in HISTORY or old.get("step", 0) <= step}
        key = (kind, place) if kind in HISTORY else (kind, step, record.get("source"))
        kept.pop(key, None)  # so that the newer record takes the newer place
        kept[key] = record
    return list(kept.values())


def evaluations(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The evaluations of each source, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "eval":
            found.setdefault(record["source"], []).append(record)
    return found


def figures(record: Record) -> dict[str, float]:
    """What a tracker shows of a step or an evaluation: loss, eval/<source>/perplexity, ...; else {}."""
    if record["kind"] not in ("train", "eval"):
        return {}
    prefix = f"eval/{record['source']}/" if record["kind"] == "eval" else ""
    values = ((n, v) for n, v in record.items() if n not in NOT_FIGURES and isinstance(v, int | float))
    return {key(prefix + name.removeprefix("eval_")): float(value) for name, value in values}


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """{"train": {"lr": 0.1}} -> {"train.lr": "0.1"}; lists as JSON, credentials in URIs blanked out."""
    if isinstance(value, dict) and value:
        pairs = (flatten(inner, f"{path}.{name}" if path else str(name)) for name, inner in value.items())
        return {name: text for part in pairs for name, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {key(path): redact(text)[:6000]}


def key(name: str) -> str:
    """MLflow takes letters, digits and _ - . / space in names."""
    return re.sub(r"[^\w\-. /]", "_", name)


def redact(text: str) -> str:
    """Blank out credentials in URIs and query strings: scheme://user:password@host, ?password=..."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _parse(line: bytes) -> Record | None:
    """None for a line that a killed writer left torn and a later one closed: it was never a record."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
