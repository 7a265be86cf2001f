"""CSV and TSV through the csv module, strictly: a record that it would silently repair is a bad one.

A source may set the delimiter and the quote. If it does not, the delimiter is a comma, in .tsv a tab, as long
as the header then has the text column; or else the first of DELIMITERS with which it has.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from raydist.corpus.formats.reader import Cut, Reader, cut_bytes, cut_lines
from raydist.corpus.formats.records import (
    MAX_RECORD_BYTES,
    Bad,
    ByteRecord,
    Item,
    Part,
    ReadOptions,
    Torn,
    no_column,
    same_name,
    too_long,
    utf8_fault,
)
from raydist.corpus.formats.streams import Opened, blocks, whole_lines

DELIMITERS = ",;\t|"
NO_QUOTE = "none"


class Dialect(NamedTuple):
    """quote: "" if there is none."""

    delimiter: str
    quote: str

    def reader(self, lines: Iterable[str]) -> Any:
        """Of the rows; see csv.reader. Fields are limited to MAX_RECORD_BYTES."""
        csv.field_size_limit(MAX_RECORD_BYTES)
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            strict=True,
        )


def _find_dialect(stream: Opened, options: ReadOptions) -> tuple[Dialect, list[str] | None]:
    """The dialect of the file, and the names of its columns: [] if it is empty, None if they cannot be read.

    Raises Torn.
    """
    quote = "" if options.quote == NO_QUOTE else options.quote or '"'
    usual = "\t" if ".tsv" in stream.file.name.lower() else ","
    others = DELIMITERS.replace(usual, "")
    found = []
    for delimiter in [options.delimiter] if options.delimiter else [usual, *others]:
        dialect = Dialect(delimiter, quote)
        found.append((dialect, _read_header(whole_lines(blocks(stream)), dialect)))
        if options.text_column in (found[-1][1] or ()):
            return found[-1]
    return found[0]


def _read(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    column = options.text_column
    dialect, header = _find_dialect(stream, options)
    if header is None:
        yield [Bad(None, "its CSV header cannot be read")]
    elif not header:
        return
    elif column not in header:
        yield [no_column(column, header)]
    elif header.count(column) > 1:
        yield [same_name(column, header)]
    else:
        lines = whole_lines(blocks(stream, part))
        yield from _read_rows(lines, header, column, dialect, skip_header=part.start == 0)


class _Lines:
    """Decoded lines for csv.reader, and the byte offset after each. A line ends at \\n, \\r or \\r\\n."""

    def __init__(self, chunks: Iterable[tuple[int, bytes]]) -> None:
        self.chunks = chunks
        self.first = -1  # offset of the first line
        self.before = 0  # lines in earlier chunks
        self.ends = np.empty(0, np.int64)
        self.is_text = True  # UTF-8 without NUL, so far; if not, undecodable bytes are surrogates

    def __iter__(self) -> Iterator[str]:
        for offset, chunk in self.chunks:
            text = chunk.decode("utf-8", "surrogateescape")
            sizes = map(len, chunk.splitlines(keepends=True))
            self.first = offset if self.first < 0 else self.first
            self.before += len(self.ends)
            self.ends = offset + np.cumsum(np.fromiter(sizes, np.int64))
            self.is_text = self.is_text and b"\0" not in chunk and utf8_fault(chunk) is None
            yield from io.StringIO(text, newline="")

    def end_of(self, line: int) -> int:
        """The offset after the `line`-th line given so far; it is in the last chunk."""
        return int(self.ends[line - self.before - 1])


def _read_header(chunks: Iterable[tuple[int, bytes]], dialect: Dialect) -> list[str] | None:
    """The names of the columns; [] for a file without any, None if they cannot be read."""
    try:
        header: list[str] = next((row for row in dialect.reader(_Lines(chunks)) if row), [])
    except csv.Error:
        return None
    return header if utf8_fault(_raw(header, dialect)) is None else None


def _read_rows(
    chunks: Iterable[tuple[int, bytes]],
    header: list[str],
    column: str,
    dialect: Dialect,
    *,
    skip_header: bool,
) -> Iterator[list[Item]]:
    """chunks: (offset, whole lines), from the start of a record. `row` is where a record starts."""
    lines = _Lines(chunks)
    reader = dialect.reader(lines)
    index, width = header.index(column), len(header)
    items: list[Item] = []
    before, row = 0, -1
    for values in _records(reader):
        if isinstance(values, Torn):
            yield items
            raise values
        if lines.before != before and items:
            yield items
            items = []
        before = lines.before
        start, row = lines.first if row < 0 else row, lines.end_of(reader.line_num)
        if skip_header and values:
            skip_header = False
        elif isinstance(values, str):
            items.append(Bad(start, f"invalid CSV: {values}", "byte"))
        elif len(values) != width:
            if values:
                fields = f"{len(values)} fields where the header has {width}"
                items.append(Bad(start, f"invalid CSV: {fields}", "byte"))
        elif lines.is_text or (fault := _text_fault(_raw(values, dialect))) is None:
            items.append(ByteRecord(values[index], start))
        else:
            items.append(Bad(start, fault, "byte"))
    yield items


def _records(reader: Iterator[list[str]]) -> Iterator[list[str] | str | Torn]:
    """Rows of the reader; the text of its error where it refuses one; last, why the rest is lost."""
    while True:
        try:
            values: list[str] | str = next(reader)
        except StopIteration:
            return
        except Torn as torn:
            yield torn
            return
        except csv.Error as error:
            values = str(error)
            if "field limit" in values:  # what follows is inside of the field
                yield Torn(too_long("a field"))
                return
        yield values


def _text_fault(raw: bytes) -> str | None:
    if b"\0" in raw:
        return "NUL bytes: it is no UTF-8 text"
    return "invalid UTF-8" if utf8_fault(raw) else None


def _raw(values: list[str], dialect: Dialect) -> bytes:
    return dialect.delimiter.join(values).encode("utf-8", "surrogateescape")


# --- places where a file can be cut


def _cut(stream: Opened, n_bytes: int, options: ReadOptions) -> list[Cut]:
    try:
        dialect, _ = _find_dialect(stream, options)
    except Torn:
        return []
    if not dialect.quote:
        return cut_lines(stream, n_bytes)
    return cut_bytes(stream, n_bytes, lambda stream, targets: _record_ends(stream, targets, dialect))


def _record_ends(stream: Opened, targets: Sequence[int], dialect: Dialect) -> Iterator[int]:
    """The first line end after each target that is provably outside quotes, scanning the whole CSV once.

    Quotes are counted as opening and closing in turn. The csv module reads them so as long as each opening
    quote follows a field's start and each closing one precedes a field's end. Behind the first quote that
    does not, nothing is proven and the file is not cut.
    """
    remaining, inside, quote = list(targets), 0, ord(dialect.quote)
    # two quotes in a row are one quote, escaped
    ends = np.array([ord(dialect.delimiter), *b"\n\r", quote], np.uint8)
    for offset, around in _with_neighbours(stream):
        data = np.frombuffer(around, np.uint8)
        quotes = np.flatnonzero(data[1:-1] == quote) + 1
        opening, closing = quotes[inside::2], quotes[1 - inside :: 2]
        unproven = [opening[~np.isin(data[opening - 1], ends)], closing[~np.isin(data[closing + 1], ends)]]
        limit = min((int(places[0]) for places in unproven if len(places)), default=len(data))
        if remaining[0] < offset + len(data):
            lines = np.flatnonzero(data[1:-1] == ord("\n")) + 1
            lines = lines[(lines < limit) & ((np.searchsorted(quotes, lines) + inside) % 2 == 0)]
            while remaining and (at := np.searchsorted(lines, remaining[0] - offset)) < len(lines):
                yield offset + int(lines[at])
                remaining.pop(0)
        if limit < len(data) or not remaining:
            return
        inside = (inside + len(quotes)) % 2


def _with_neighbours(stream: Opened) -> Iterator[tuple[int, bytes]]:
    """(offset, block with the byte before and the byte after it). The file counts as between line ends."""
    before, held, offset = b"\n", b"", 0
    for start, block in blocks(stream):
        if held:
            yield offset, before + held + block[:1]
            before = held[-1:]
        held, offset = block, start
    if held:
        yield offset, before + held + b"\n"


CSV = Reader("csv", ("csv", "tsv"), _read, _cut)
