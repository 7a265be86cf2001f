"""What every reader takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from raydist.job.schema import Format

CHUNK_BYTES = 4 * 2**20  # of text, in one list of items


@dataclass(frozen=True)
class Part:
    """A piece of one file. `file`: its index in the list of files.

    start, end: bytes of an uncompressed line file or CSV, row groups of parquet, record batches of
    Arrow; 0 and -1 is the whole file.
    """

    file: int
    start: int = 0
    end: int = -1

    @property
    def is_whole(self) -> bool:
        return self.end == -1


@dataclass(frozen=True)
class ReadOptions:
    format: Format
    text_column: str
    document: Literal["line", "paragraph", "file"]


class Record(NamedTuple):
    """A document. `row`: byte offset (after decompression) in lines, paragraphs and CSV, else row number."""

    text: str
    row: int


class Bad(NamedTuple):
    """What cannot be read, and why; `row` is None where the file or all that is left of it is meant."""

    row: int | None
    reason: str


class NoColumn(Bad):
    """The text column is not there."""

    __slots__ = ()


Item = Record | Bad


class Torn(Exception):
    """The content of a file ends or breaks before its end. Never leaves this package."""


def decoded(raw: bytes, row: int) -> Item:
    try:
        return Record(raw.decode(), row)
    except UnicodeDecodeError as error:
        return Bad(row, f"invalid UTF-8 at byte {error.start}")


def utf8_fault(raw: bytes) -> str | None:
    """Why `raw` is not UTF-8, or None when it is."""
    item = decoded(raw, 0)
    return item.reason if isinstance(item, Bad) else None


def no_column(column: str, names: list[str]) -> NoColumn:
    return NoColumn(None, f"no column '{column}' (columns: {listed(names)})")


def listed(names: list[str]) -> str:
    """ "a, b" and, after twenty, how many more."""
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more
