"""CSV and TSV through the csv module, strictly: what it would mend silently is a bad record."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from raydist.corpus.formats.records import Bad, Item, Record, utf8_fault


def delimiter_of(name: str) -> str:
    return "\t" if ".tsv" in name.lower() else ","


class _Lines:
    """Decoded lines for csv.reader, and the byte offset after each. Ends at \\n, \\r or \\r\\n, as in csv."""

    def __init__(self, chunks: Iterable[tuple[int, bytes]]) -> None:
        self.chunks = chunks
        self.first = -1  # offset of the first line
        self.before = 0  # lines in earlier chunks
        self.ends = np.empty(0, np.int64)
        self.is_utf8 = True  # so far; else undecodable bytes are surrogates

    def __iter__(self) -> Iterator[str]:
        for offset, chunk in self.chunks:
            text = chunk.decode("utf-8", "surrogateescape")
            sizes = map(len, chunk.splitlines(keepends=True))
            self.first = offset if self.first < 0 else self.first
            self.before += len(self.ends)
            self.ends = offset + np.cumsum(np.fromiter(sizes, np.int64))
            self.is_utf8 = self.is_utf8 and utf8_fault(chunk) is None
            yield from io.StringIO(text, newline="")

    def end_of(self, line: int) -> int:
        """The offset after the `line`-th line given so far; it is in the last chunk."""
        return int(self.ends[line - self.before - 1])


def read_header(chunks: Iterable[tuple[int, bytes]], delimiter: str) -> list[str] | None:
    """The names of the columns; None when the file has none or they cannot be read."""
    csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(_Lines(chunks), delimiter=delimiter, strict=True)
        header = next((row for row in reader if row), None)
    except csv.Error:
        return None
    return header if header and utf8_fault(_raw(header, delimiter)) is None else None


def read_rows(
    chunks: Iterable[tuple[int, bytes]], header: list[str], column: str, delimiter: str, *, skip_header: bool
) -> Iterator[list[Item]]:
    """chunks: (offset, whole lines), from the start of a record. `row` is where a record starts."""
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(chunks)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    index, width = header.index(column), len(header)
    items: list[Item] = []
    before, row = 0, -1
    for values in _records(reader):
        if lines.before != before and items:
            yield items
            items = []
        before = lines.before
        start, row = lines.first if row < 0 else row, lines.end_of(reader.line_num)
        if skip_header and values:
            skip_header = False
        elif isinstance(values, str):
            items.append(Bad(start, f"invalid CSV: {values}"))
        elif len(values) != width:
            if values:
                items.append(Bad(start, f"invalid CSV: {len(values)} fields where the header has {width}"))
        elif lines.is_utf8 or (fault := utf8_fault(_raw(values, delimiter))) is None:
            items.append(Record(values[index], start))
        else:
            items.append(Bad(start, fault))
    yield items


def _records(reader: Iterator[list[str]]) -> Iterator[list[str] | str]:
    """Rows of the reader; the text of its error where it refuses one."""
    while True:
        try:
            values: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            values = str(error)
        yield values


def _raw(values: list[str], delimiter: str) -> bytes:
    return delimiter.join(values).encode("utf-8", "surrogateescape")
