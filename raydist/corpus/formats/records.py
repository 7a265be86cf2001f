"""What every reader is given (Part, ReadOptions) and what it gives (Record, Bad)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

CHUNK_BYTES = 4 * 2**20
"""Text in one list of items, about."""


@dataclass(frozen=True)
class Part:
    """A part of one file. `file`: its index in the list of files.

    start, end: in bytes, row groups or record batches, as the format's reader counts. 0 and -1: the whole
    file, whatever its format.
    """

    file: int
    start: int = 0
    end: int = -1

    @property
    def is_whole(self) -> bool:
        return self.end == -1


WHOLE = Part(0)


@dataclass(frozen=True)
class ReadOptions:
    """A source's `format`, `text_column` and `document`. What a file is read as stands in `File.format`."""

    format: str
    text_column: str
    document: Literal["line", "paragraph", "file"]


class Record(NamedTuple):
    """A document. `row`: its byte offset (decompressed) in lines, paragraphs and CSV, else its number."""

    text: str
    row: int


class Bad(NamedTuple):
    """A record that cannot be read, and why. `row`: as in Record; None for the file, or the rest of it."""

    row: int | None
    reason: str


class NoColumn(Bad):
    """The text column is missing."""

    __slots__ = ()


Item = Record | Bad


class Torn(Exception):
    """The content of a file is damaged or ends too early. `read_part` turns it into a Bad."""


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
