"""Numbers, sizes, times and values as text for people. Sizes are decimal: 1 MB is 10^6 bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from raydist.redact import redact

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b.|[\x00-\x08\x0b-\x1f\x7f]")


def number(value: float | None) -> str:
    """About four digits: 4,012, 45.21, 3.142."""
    if value is None or value != value:
        return "n/a"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def short(count: float) -> str:
    """Three digits: 1.97M, 12.6k, 840."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.3g}{letter}" if count < 999.5 * unit else f"{count / unit:,.0f}{letter}"
    return f"{count:,.0f}"


def size(n_bytes: float) -> str:
    """Three digits in decimal units: 840 B, 12.6 kB, 1.97 GB."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n_bytes >= 0.9995 * unit:
            scaled = n_bytes / unit
            return f"{scaled:.3g} {letter}B" if scaled < 100 else f"{scaled:,.0f} {letter}B"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """1:02 for 62 seconds, 1:01:02, 2 d 03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def phases(seconds: Mapping[str, float]) -> str:
    """start 5.2 s, first step 0.4 s, ..."""
    return ", ".join(f"{name.replace('_', ' ')} {spent:,.1f} s" for name, spent in seconds.items())


def segment(record: Mapping[str, Any]) -> str:
    """The beginning of an extension, and what changes with it."""
    weights = (record.get("weights") or {}).items()
    sources = ", ".join(f"{name} {weight:.4g}" for name, weight in weights if weight is not None)
    rate = "rises again" if record.get("rewarm") else "stays"
    return (
        f"extension from step {record['step']:,} on: {record.get('steps', 0):,} steps,"
        f" the learning rate {rate}, the optimizer is {record.get('optimizer')}"
        + (f", samples from {sources}" if sources else "")
    )


def skip(record: Mapping[str, Any]) -> str:
    """A bad step, what became of it, and the first of its documents."""
    became = {"recorded": "is bad, and was trained"}.get(record["action"], "was skipped")
    documents, more = record["documents"], record.get("more_documents") or 0
    named = [f"{each.get('source')}: {each.get('file')}, row {each.get('row')}" for each in documents[:1]]
    others = len(documents) - len(named) + more
    named += [f"and {others:,} more documents"] if others else []
    back = record.get("back_to")
    return (
        f"step {record['step']:,} {became}: {record['reason']}"
        + (f" ({' '.join(named)})" if named else "")
        + (f"; the run goes back to step {back:,} and skips all samples since" if back is not None else "")
    )


def tried(record: Mapping[str, Any]) -> str:
    """Of an attempt's start: which micro batches were tried to find the largest that fits, or why none was.

    Empty where nothing was to be found.
    """
    if why := record.get("micro_batch_not_tried"):
        return f"not tried for size: {why}"
    tries = ", ".join(
        f"{each['sequences']} ({size(each['bytes']) if each['bytes'] else 'out of memory'})"
        for each in record.get("micro_batches_tried", ())
    )
    return f"tried {tries} of {size(record['device_bytes'])}" if tries else ""


def date(seconds: float | None) -> str:
    """Date and time in UTC, to the second."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def clean(text: str) -> str:
    """`text` without escape sequences and control characters, since a message may quote anything."""
    return _CONTROL.sub("", text)


def shown(value: Any) -> str:
    """The value of a key of a job: a float with four digits, text as it is, anything else as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
