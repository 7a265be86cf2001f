"""How raydist writes files: whole, by renaming a temporary file, or by appending a line."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the whole new one. On an exception nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a later rename cannot reach the disk before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Sorted keys and two-space indent, so that equal values give equal bytes."""
    write_bytes(path, orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2) + b"\n")


def read_json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in the file; {} if there is no such file."""
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    return record


def append_json(path: Path, record: dict[str, Any], *, flush: bool = False) -> None:
    """Append one record as a line. `flush`: return only when it is on disk."""
    with path.open("ab") as stream:
        stream.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        if flush:
            stream.flush()
            os.fsync(stream.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of `path` as a record; [] if there is no such file.

    A process killed while appending leaves a last line without a newline: that line is not a record
    and is left out.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [orjson.loads(line) for line in whole.split(b"\n") if line.strip()]
