"""Plain text: a document is a line, a paragraph or the whole file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import compress

from raydist.corpus.formats.reader import Cut, Reader, cut_bytes, cut_lines, search
from raydist.corpus.formats.records import (
    MAX_RECORD_BYTES,
    Bad,
    ByteRecord,
    Item,
    Part,
    ReadOptions,
    Torn,
    decoded,
    too_long,
)
from raydist.corpus.formats.streams import Opened, blocks, lines_but_long_ones, lines_of, whole_lines

# A line is blank when it holds ASCII white space only, so a cut can be found in bytes, without decoding.
BLANK_LINES = re.compile(rb"\n(?:[ \t\r\v\f]*\n)+")  # from the end of the line before them
FIRST_BLANK_LINES = re.compile(rb"(?:[ \t\r\v\f]*\n)*")


def _read(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    content = blocks(stream, part)
    if options.document == "file":
        return _read_file(content)
    if options.document == "paragraph":
        return _read_paragraphs(whole_lines(content))
    return _read_lines(lines_but_long_ones(content))


def _document(raw: bytes, row: int) -> Item:
    if b"\0" in raw:
        return Bad(row, "NUL bytes: it is no UTF-8 text", "byte")
    return decoded(raw, row, ByteRecord)


def _read_lines(chunks: Iterable[tuple[int, bytes | None]]) -> Iterator[list[Item]]:
    """chunks: (offset, whole lines). Lines end at \\n alone; one \\r before it is left out as well."""
    for offset, chunk in chunks:
        if chunk is None:
            yield [Bad(offset, too_long("a line"), "byte")]
            continue
        lines, rows = lines_of(offset, chunk)
        try:
            texts = chunk.decode().removesuffix("\n").split("\n") if b"\0" not in chunk else None
        except UnicodeDecodeError:
            texts = None
        if texts is None:
            pairs = zip(lines, rows, strict=True)
            yield [_document(line.removesuffix(b"\r"), row) for line, row in pairs if line.strip()]
            continue
        if b"\r" in chunk:
            texts = [text.removesuffix("\r") for text in texts]
        yield list(map(ByteRecord._make, compress(zip(texts, rows, strict=True), map(bytes.strip, lines))))


def _read_paragraphs(chunks: Iterable[tuple[int, bytes]]) -> Iterator[list[Item]]:
    """chunks: (offset, whole lines). Paragraphs stand between blank lines and keep their inner line ends."""
    held, start = b"", 0
    for offset, chunk in chunks:
        start = start if held else offset
        searched = max(0, len(held) - 1)  # `held` contains no blank line, but may end before one
        held += chunk
        if BLANK_LINES.search(held, searched):
            items, used = _paragraphs(held, start)
            yield items
            held, start = held[used:], start + used
        if len(held) > MAX_RECORD_BYTES:
            raise Torn(f"{too_long('a paragraph')} starts at byte {start}")
    first = _first_line(held)
    if held[first:].strip():
        body, newline, last = held[first:].rpartition(b"\n")
        raw = body if newline and not last.strip() else held[first:]
        yield [_document(raw.removesuffix(b"\r"), start + first)]


def _first_line(content: bytes) -> int:
    """Where the first line that is not blank starts."""
    match = FIRST_BLANK_LINES.match(content)
    return match.end() if match else 0


def _paragraphs(content: bytes, offset: int) -> tuple[list[Item], int]:
    """The paragraphs that a blank line ends, and how many bytes they take."""
    begins, ends = [_first_line(content)], []
    for blank in BLANK_LINES.finditer(content, begins[0]):
        ends.append(blank.start())
        begins.append(blank.end())
    used = begins.pop()
    edges = zip(begins, ends, strict=True)
    return [_document(content[a:b].removesuffix(b"\r"), offset + a) for a, b in edges], used


def _read_file(content: Iterable[tuple[int, bytes]]) -> Iterator[list[Item]]:
    """The whole content as one document, also when it is empty."""
    held, size = [], 0
    for _, block in content:
        held.append(block)
        size += len(block)
        if size > MAX_RECORD_BYTES:
            yield [Bad(0, too_long("a document"), "byte")]
            return
    yield [_document(b"".join(held), 0)]


def _cut(stream: Opened, n_bytes: int, options: ReadOptions) -> list[Cut]:
    if options.document == "file":
        return []
    return cut_lines(stream, n_bytes) if options.document == "line" else _cut_paragraphs(stream, n_bytes)


def _cut_paragraphs(stream: Opened, n_bytes: int) -> list[Cut]:
    """Byte ranges that end behind blank lines."""

    def find(window: bytes, _: int) -> int:
        match = BLANK_LINES.search(window)
        return match.end() if match else 0

    return cut_bytes(
        stream, n_bytes, lambda stream, targets: [search(stream, target, find) for target in targets]
    )


TEXT = Reader("text", ("txt", "text", "md", "py"), _read, _cut, has_columns=False)
