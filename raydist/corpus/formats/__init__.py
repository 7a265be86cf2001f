"""Readers of source files: every record as it is, or the reason why it cannot be read.

    File, Part -> blocks -> (decompressed) -> whole lines -> jsonl | text | csv -> lists of Record and Bad
                                  \\-> json array                                            ^
    File, Part -> row groups or record batches of one column -> parquet | arrow -----------/

Content is UTF-8, decoded strictly. A list holds about 4 MiB of text, so that memory does not grow with
the file. Damage never raises: it is a Bad. Storage that fails, or a file that changed, raises CorpusError.
"""

from __future__ import annotations

from collections.abc import Iterator

from raydist.corpus.extensions import Compression, Kind, detect_format
from raydist.corpus.files import File
from raydist.corpus.formats import columns, csv, json, text
from raydist.corpus.formats.records import Bad, Item, NoColumn, Part, ReadOptions, Record, Torn, no_column
from raydist.corpus.formats.streams import Opened, blocks, whole_lines
from raydist.errors import CorpusError

__all__ = ["Bad", "Item", "Part", "ReadOptions", "Record", "check_column", "layout", "read_part"]


def layout(file: File, options: ReadOptions) -> tuple[Kind, Compression | None]:
    """Format and compression; a .json file whose first character is not '[' is read as JSON Lines."""
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
    content = blocks(stream, part, compression)
    if kind == "jsonl":
        lines = whole_lines(content)
        whole = part.start == 0 and part.end in (-1, stream.file.size)
        if whole and detect_format(stream.file.name, options.format)[0] == "json":
            return json.read_columns_or_lines(lines, column)
        return json.read_lines(lines, column)
    if kind == "json":
        return json.read_array((block for _, block in content), column)
    if kind == "csv":
        return _csv_items(stream, part, column, compression)
    if options.document == "file":
        return text.read_file(content)
    read = text.read_paragraphs if options.document == "paragraph" else text.read_lines
    return read(whole_lines(content))


def _csv_items(
    stream: Opened, part: Part, column: str, compression: Compression | None
) -> Iterator[list[Item]]:
    delimiter = csv.delimiter_of(stream.file.name)
    header = csv.read_header(whole_lines(blocks(stream, Part(0), compression)), delimiter)
    if header is None or column not in header:
        return iter([[no_column(column, header) if header else Bad(None, "its CSV header cannot be read")]])
    lines = whole_lines(blocks(stream, part, compression))
    return csv.read_rows(lines, header, column, delimiter, skip_header=part.start == 0)


def _first_character(stream: Opened, compression: Compression | None) -> bytes:
    try:
        starts = (block.lstrip()[:1] for _, block in blocks(stream, Part(0), compression))
        return next(filter(None, starts), b"")
    except Torn:
        return b""


def check_column(file: File, options: ReadOptions) -> None:
    """CorpusError if the schema, the header or all the first records of `file` lack the text column.

    A file that cannot be read passes: reading it says what is wrong with it.
    """
    if layout(file, options)[0] == "text":
        return
    first = next(read_part(file, Part(0), options), [])
    missing = [item for item in first if isinstance(item, NoColumn)]
    if missing and len(missing) == len(first):
        raise CorpusError(
            f"{file.name} has {missing[0].reason}", where=file.location, why="no text can be read from it",
            fix="set the source's text_column to the one that holds the text",
        )  # fmt: skip
