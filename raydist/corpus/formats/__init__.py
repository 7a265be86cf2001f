"""Readers of source files: every record as it is, or the reason why it cannot be read.

    File, Part ─▶ Opened ─▶ blocks ─▶ whole lines ─▶ text, csv, json lines ─▶ lists of Record and Bad
                    │          └──────────────────▶ json array ─────────────▶ of about 4 MiB of text
                    └─ row groups, record batches ─▶ parquet, arrow ────────▶

    table       READERS: every format; which one a file's name means
    content     the format of a file by its content, where its name says none
    reader      Reader: what a format consists of; splitting files at lines or into units
    columns     parquet, arrow: the text column alone, a few MiB at a time
    decoder     runs these two in another process, which damaged files can crash
    csv, json, text   the other formats
    streams     bytes of a file: opened, decompressed, in blocks and whole lines
    records     Part, ReadOptions, Record and ByteRecord, Bad

A new format is a module here that makes a Reader, and its line in `table.READERS` (and its name in the
job's schema, which cannot import this package: a test compares the two).

Content is UTF-8, or converted to it, decoded strictly. Damage never raises: it becomes a Bad, which the
package raydist.corpus follows from here. Storage that fails, or a file that changed, raises CorpusError.
"""

from __future__ import annotations

from collections.abc import Iterator

from raydist.corpus.formats import decoder
from raydist.corpus.formats.content import recognise
from raydist.corpus.formats.reader import Cut
from raydist.corpus.formats.records import (
    LFS_POINTER,
    POINTER_BYTES,
    UTF_8,
    WHOLE,
    Bad,
    ByteRecord,
    Item,
    NoColumn,
    Part,
    ReadOptions,
    Record,
    SameName,
    Torn,
    Unit,
    Wrapped,
)
from raydist.corpus.formats.streams import Opened
from raydist.corpus.formats.table import (
    READERS,
    UNUSED,
    detect_format,
    format_named,
    is_known,
    names_no_format,
    reader_of,
    why_unknown,
)
from raydist.corpus.locations import File
from raydist.errors import CorpusError

__all__ = [
    "POINTER_BYTES",
    "READERS",
    "UNUSED",
    "Bad",
    "ByteRecord",
    "Item",
    "Part",
    "ReadOptions",
    "Record",
    "Unit",
    "check_column",
    "cut_file",
    "detect_format",
    "format_named",
    "is_known",
    "is_pointer",
    "names_no_format",
    "read_part",
    "recognise",
    "why_unknown",
]


def cut_file(file: File, n_bytes: int, options: ReadOptions) -> list[Cut]:
    """Parts of about n_bytes; [] for a file that has to be read as a whole, or is no larger than that.

    Text of another encoding than UTF-8 is converted from its start on, as compressed text is decompressed.
    """
    reader = reader_of(file)
    cut, is_converted = reader.cut, options.encoding != UTF_8 and reader.may_be_compressed
    if file.size <= n_bytes or file.compression or is_converted or cut is None:
        return []
    with Opened(file) as stream:
        return decoder.cut(stream, n_bytes, options) if reader.count else cut(stream, n_bytes, options)


def read_part(file: File, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """Lists of the records of `part` in the file's order; never an empty list."""
    reader = reader_of(file)
    read = decoder.read if reader.count else reader.read
    with Opened(file, options.encoding) as stream:
        if file.size <= POINTER_BYTES and is_pointer(stream.read(len(LFS_POINTER))):
            yield [Bad(None, "a Git LFS pointer, not the file itself: run `git lfs pull`")]
            return
        stream.seek(0)
        try:
            yield from filter(None, read(stream, part, options))
        except Torn as error:
            yield [Bad(None, str(error))]


def is_pointer(start: bytes) -> bool:
    """Whether a file of at most POINTER_BYTES is Git LFS's pointer to its content. start: its first bytes."""
    return start.startswith(LFS_POINTER)


def check_column(file: File, options: ReadOptions) -> None:
    """CorpusError if the schema, the header or all the first records of `file` lack the text column.

    So too if its schema or header names that column twice.

    A file that cannot be read passes: reading it reports what is wrong with it.
    """
    if not reader_of(file).has_columns:
        return
    first = next(read_part(file, WHOLE, options), [])
    if first and isinstance(first[0], SameName):
        raise CorpusError(
            f"{file.name} has {first[0].reason}", where=file.location, why="reading one of them is a guess",
            fix="rename one of them in the file",
        )  # fmt: skip
    missing = [item for item in first if isinstance(item, NoColumn)]
    if missing and len(missing) == len(first):
        key = "records to the path of a list" if isinstance(missing[0], Wrapped) else "text_column to the one"
        more = ", or its delimiter" if file.format == "csv" else ""
        raise CorpusError(
            f"{file.name} has {missing[0].reason}", where=file.location, why="no text can be read from it",
            fix=f"set the source's {key} that holds the text{more}",
        )  # fmt: skip
