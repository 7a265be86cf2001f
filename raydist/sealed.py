"""JSON objects that carry their own checksum, as files or as lines, so that an altered one is never believed.

One without a checksum, as older versions wrote it, is read as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import orjson
import xxhash

from raydist import files
from raydist.errors import RaydistError

CHECKSUM = "checksum"
"""The key of the checksum: xxh3-128 of the other keys and values as JSON with sorted keys."""


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """Equal records give equal bytes."""
    files.write_json(path, sealed(record))


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum."""
    return {**record, CHECKSUM: _checksum(record)}


def read_sealed(
    path: Path, error: type[RaydistError], fix: str, *, keys: Collection[str] = ()
) -> dict[str, Any]:
    """The object in the file, without its checksum. keys: those that it must have.

    Raises `error` with `fix` if the file holds anything else than what was written, FileNotFoundError if
    there is no such file.
    """
    try:
        record = files.read_json(path)
    except (IsADirectoryError, ValueError) as fault:
        raise _damaged(path, error, fix, str(fault)) from fault
    if not isinstance(record, dict):
        raise _damaged(path, error, fix, "it holds no JSON object")
    if record.pop(CHECKSUM, None) not in (None, _checksum(record)):
        raise _damaged(path, error, fix, "its content does not match its checksum")
    if missing := [key for key in keys if key not in record]:
        raise _damaged(path, error, fix, f"it does not hold what raydist writes there: no {missing[0]}")
    return record


def is_sealed(path: Path) -> bool:
    """Whether a readable file carries a checksum."""
    return CHECKSUM in files.read_json(path)


# --- a line each ---------------------------------------------------------------------------------


def append_sealed(path: Path, record: Mapping[str, Any], *, flush: bool = False) -> None:
    """Append the record as a line. flush: return only when it is on disk."""
    files.append_line(path, sealed_line(record), flush=flush)


def sealed_line(record: Mapping[str, Any]) -> bytes:
    """The record as a line, without its newline."""
    line = orjson.dumps(dict(record), option=orjson.OPT_SERIALIZE_NUMPY)
    return line[:-1] + f',"{CHECKSUM}":"{xxhash.xxh3_64_hexdigest(line)}"}}'.encode()


def opened(line: bytes) -> dict[str, Any]:
    """The record in the line, without its checksum. Raises ValueError if it is not what was written."""
    found = _SEALED_LINE.fullmatch(line)
    if found and xxhash.xxh3_64_hexdigest(found[1] + b"}").encode() != found[2]:
        raise ValueError("its content does not match its checksum")
    record = orjson.loads(found[1] + b"}" if found else line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def read_sealed_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of `path` as a record; [] if there is no such file. See files.read_jsonl.

    Raises RunError for a line that is not what was written.
    """
    return files.read_jsonl(path, opened)


_SEALED_LINE = re.compile(rb'(\{.+),"checksum":"([0-9a-f]{16})"\}')
"""xxh3-64, since a line is short."""


def _checksum(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(dict(record), option=orjson.OPT_SORT_KEYS))


def _damaged(path: Path, error: type[RaydistError], fix: str, why: str) -> RaydistError:
    return error(f"{path.name} is damaged", where=str(path), why=why, fix=fix)
