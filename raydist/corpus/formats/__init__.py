"""Readers of source files: every record as it is, or the reason why it cannot be read.

    File, Part -> blocks -> (decompressed) -> whole lines -> jsonl | text | csv -> lists of Record and Bad
                                  \\-> json array                                            ^
    File, Part -> row groups or record batches of one column -> parquet | arrow -----------/

Content is UTF-8, decoded strictly. A list holds about 4 MiB of text, so that memory does not grow with
the file. Damage never raises: it is a Bad. Storage that fails, or a file that changed, raises CorpusError.
"""

from __future__ import annotations

from collections.abc import Iterator

from raydist.corpus.extensions import FORMATS, Compression, Kind, detect_format
from raydist.corpus.files import File
from raydist.corpus.formats import columns, csv, json, text
from raydist.corpus.formats.records import Bad, Item, NoColumn, Part, ReadOptions, Record, Torn, no_column
from raydist.corpus.formats.streams import Opened, blocks, whole_lines, without_bom
from raydist.errors import CorpusError

__all__ = [
    "FORMATS",
    "Bad",
    "Item",
    "Part",
    "ReadOptions",
    "Record",
    "check_column",
    "detect_format",
    "layout",
    "read_part",
]

Offsets = Iterator[tuple[int, bytes]]


def layout(file: File, options: ReadOptions) -> tuple[Kind, Compression | None]:
    """Format and compression; a .json file whose first character is not '[' holds JSON Lines."""
    kind, compression = detect_format(file.name, options.format)
    if kind == "json":
        with Opened(file) as stream:
            if _first_character(stream, compression) != b"[":
                return "jsonl", compression
    return kind, compression


def read_part(file: File, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """Lists of the records of `part` in the file's order; never an empty list."""
    kind, compression = layout(file, options)
    with Opened(file) as stream:
        try:
            yield from filter(None, _items(stream, part, options, kind, compression))
        except Torn as error:
            yield [Bad(None, str(error))]


def _items(
    stream: Opened, part: Part, options: ReadOptions, kind: Kind, compression: Compression | None
) -> Iterator[list[Item]]:
    column = options.text_column
    if kind == "parquet":
        return columns.read_parquet(stream, part, column)
    if kind == "arrow":
        return columns.read_arrow(stream, part, column)
    content = without_bom(blocks(stream, part, compression), part)
    if kind == "jsonl":
        return json.read_lines(whole_lines(content), column)
    if kind == "json":
        return json.read_array((block for _, block in content), column)
    if kind == "csv":
        return _csv_items(stream.file, part, column, compression, whole_lines(content))
    if options.document == "file":
        return text.read_file(content)
    read = text.read_paragraphs if options.document == "paragraph" else text.read_lines
    return read(whole_lines(content))


def _csv_items(
    file: File, part: Part, column: str, compression: Compression | None, chunks: Offsets
) -> Iterator[list[Item]]:
    header = _csv_header(file, compression)
    if header is None or column not in header:
        return iter([[no_column(column, header) if header else Bad(None, "its CSV header cannot be read")]])
    return csv.read_rows(chunks, header, column, csv.delimiter_of(file.name), skip_header=part.start == 0)


def _csv_header(file: File, compression: Compression | None) -> list[str] | None:
    with Opened(file) as stream:
        return csv.read_header(_whole(stream, compression), csv.delimiter_of(file.name))


def _whole(stream: Opened, compression: Compression | None) -> Offsets:
    whole = Part(0, 0, -1)
    return whole_lines(without_bom(blocks(stream, whole, compression), whole))


def _first_character(stream: Opened, compression: Compression | None) -> bytes:
    whole = Part(0, 0, -1)
    try:
        for _, block in without_bom(blocks(stream, whole, compression), whole):
            if block.strip():
                return block.lstrip()[:1]
    except Torn:
        return b""
    return b""


def check_column(file: File, options: ReadOptions) -> None:
    """CorpusError if the schema, the header or all the first records of `file` lack the text column.

    A file that cannot be read passes: reading it says what is wrong with it.
    """
    if layout(file, options)[0] == "text":
        return
    first = next(read_part(file, Part(0, 0, -1), options), [])
    missing = [item for item in first if isinstance(item, NoColumn)]
    if missing and len(missing) == len(first):
        raise CorpusError(
            f"{file.name} has {missing[0].reason}", where=file.location, why="no text can be read from it",
            fix="set the source's text_column to the one that holds the text",
        )  # fmt: skip
