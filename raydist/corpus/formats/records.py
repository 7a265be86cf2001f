"""What every reader is given (Part, ReadOptions) and what it gives (Record, Bad)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

CHUNK_BYTES = 4 * 2**20
"""Text in one list of items, about."""
UTF_8 = "utf-8"
LFS_POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/v1", 1024
"""What a Git LFS pointer begins with, and the most bytes that one has."""
MAX_RECORD_BYTES = 128 * 2**20
"""A record that is longer, about, is bad. Tokenizing takes some forty times its size in memory."""


@dataclass(frozen=True, slots=True)
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
    """A source's `format`, `text_column`, `document` and `encoding`, `records`, `delimiter` and `quote`.

    What a file is read as stands in `File.format`.
    """

    format: str
    text_column: str
    document: Literal["line", "paragraph", "file"]
    encoding: str = UTF_8
    records: str | None = None
    delimiter: str | None = None
    quote: str | None = None


Unit = Literal["row", "byte"]
"""What a record's `row` is: its number in the file, or the byte of the decompressed file where it starts.

Both count from 0, and from the start of the file whatever part of it is read.
"""


class Record(NamedTuple):
    """A document. row: its number among the file's rows or elements."""

    text: str
    row: int

    @property
    def unit(self) -> Unit:
        return "row"


class ByteRecord(Record):
    """A document. row: the byte where it starts. Lines are not counted: a part may begin anywhere."""

    __slots__ = ()

    @property
    def unit(self) -> Unit:
        return "byte"


class Bad(NamedTuple):
    """A record that cannot be read, and why. row: as `unit` says; None for the file, or the rest of it."""

    row: int | None
    reason: str
    unit: Unit = "row"


class NoColumn(Bad):
    """The text column is missing."""

    __slots__ = ()


class Wrapped(NoColumn):
    """So it is, but the file is one object with lists of records, which the source's `records` may name."""

    __slots__ = ()


class SameName(Bad):
    """Several columns have the text column's name: reading one of them would be a guess."""

    __slots__ = ()


Item = Record | Bad


class Torn(Exception):
    """The content of a file is damaged or ends too early. `read_part` turns it into a Bad."""


def unit_of(kind: type[Record]) -> Unit:
    return "byte" if issubclass(kind, ByteRecord) else "row"


def decoded(raw: bytes, row: int, kind: type[Record]) -> Item:
    """kind: what it becomes, which says what `row` counts."""
    try:
        return kind(raw.decode(), row)
    except UnicodeDecodeError as error:
        return Bad(row, f"invalid UTF-8 at byte {error.start} of the record", unit_of(kind))


def utf8_fault(raw: bytes) -> str | None:
    """Why the bytes of a record are not UTF-8, or None when they are."""
    item = decoded(raw, 0, Record)
    return item.reason if isinstance(item, Bad) else None


def too_long(what: str, limit: int = MAX_RECORD_BYTES) -> str:
    return f"{what} of more than {limit >> 20} MiB"


def no_column(column: str, names: list[str]) -> NoColumn:
    return NoColumn(None, f"no column '{column}' (columns: {listed(names)})")


def same_name(column: str, names: list[str]) -> SameName:
    return SameName(None, f"{names.count(column)} columns named '{column}' (columns: {listed(names)})")


def listed(names: list[str]) -> str:
    """ "a, b" and, after twenty, how many more. Halves of surrogate pairs are escaped."""
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]).encode("utf-8", "backslashreplace").decode() + more
