"""JSON objects in files that carry their own checksum, so that an altered file is never believed.

A file without a checksum, as older versions wrote it, is read as it is.
"""

from __future__ import annotations

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


def _checksum(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(dict(record), option=orjson.OPT_SORT_KEYS))


def _damaged(path: Path, error: type[RaydistError], fix: str, why: str) -> RaydistError:
    return error(f"{path.name} is damaged", where=str(path), why=why, fix=fix)
