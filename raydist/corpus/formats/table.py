"""The table of file formats, and which of them a file's name means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from raydist.corpus.formats import columns, csv, json, text
from raydist.corpus.formats.reader import Reader
from raydist.corpus.formats.records import Bad, Item, Part, ReadOptions
from raydist.corpus.formats.streams import COMPRESSIONS, Opened
from raydist.corpus.locations import File
from raydist.errors import CorpusError

ROTATED = re.compile(r"\d{1,8}")
"""What logrotate and others add to a name: a number or a date."""
READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        columns.PARQUET,
        json.JSONL,
        json.JSON,
        csv.CSV,
        text.TEXT,
        columns.ARROW,
    )
}
"""Every format by its name. The job's schema lists the same names; a test compares the two."""


def _read_unused(stream: Opened, _: Part, __: ReadOptions) -> Iterator[list[Item]]:
    yield [Bad(None, f"not used: {why_unknown(stream.file.name)}")]


UNUSED = Reader("unused", (), _read_unused, has_columns=False)
"""Reads a file of an unknown format, as one bad file. A job cannot ask for it."""


def reader_of(file: File) -> Reader:
    return READERS.get(file.format, UNUSED)


class FileFormat(NamedTuple):
    """format: a key of READERS.  compression: one of COMPRESSIONS, or None."""

    format: str
    compression: str | None


def is_known(name: str) -> bool:
    """Whether `format: auto` can read a file of this name."""
    extension, compression = _extensions(name)
    reader = _reader_of(extension)
    return reader is not None and (reader.may_be_compressed or not compression)


def format_named(name: str) -> str | None:
    """The format that a file's name means; None if `format: auto` cannot read a file of this name."""
    return detect_format(name, "auto").format if is_known(name) else None


def names_no_format(name: str) -> bool:
    """Whether a name says nothing of a format, so that only the content can: part-00000, a.gz, a.log.1."""
    return _split_extensions([part for part in _suffixes(name) if not ROTATED.fullmatch(part)])[0] in (
        "",
        "log",
    )


def why_unknown(name: str) -> str:
    """Why `format: auto` cannot read a file of this name."""
    extension, compression = _extensions(name)
    if compression and (reader := _reader_of(extension)):
        return f"{reader.name} inside .{compression} has to be decompressed"
    parts = name.rsplit("/", 1)[-1].lower().split(".")
    inner = [part for part in parts[1:-1] if _reader_of(part)]
    if inner and not compression:
        return f".{parts[-1]} follows .{inner[-1]}: rename it"
    if re.fullmatch(r"\w{1,12}", extension):
        return f".{extension} is no format that raydist reads"
    return "no extension says which format it has"


def detect_format(name: str, asked: str) -> FileFormat:
    """By a file's name; `asked`, unless "auto", replaces the format that its extension means.

    CorpusError: an unknown extension, or a compressed file of a format that cannot be compressed.
    """
    extension, compression = _extensions(name)
    reader = _reader_of(extension) if asked == "auto" else READERS[asked]
    if reader is None:
        known = ", ".join(f".{extension}" for reader in READERS.values() for extension in reader.extensions)
        raise CorpusError(
            f"the format of {name} is unknown",
            where=name,
            why=f"its name ends in none of {known}, with or without {_listed(COMPRESSIONS)} after those",
            fix=f"set the source's format to one of {', '.join(READERS)}",
        )
    if compression and not reader.may_be_compressed:
        raise CorpusError(
            f"{name} is {reader.name} inside .{compression}",
            where=name,
            why=f"{reader.name} files are read in parts and hold their own compression",
            fix=f"decompress the file, leaving .{reader.name}",
        )
    return FileFormat(reader.name, compression)


def _reader_of(extension: str) -> Reader | None:
    return next((reader for reader in READERS.values() if extension in reader.extensions), None)


def _extensions(name: str) -> tuple[str, str | None]:
    """("csv", "gz") of a/b.CSV.gz: the extension in lower case, and the compression that follows it.

    So too of a file that was rotated, b.csv.1.gz.
    """
    suffixes = _suffixes(name)
    found = _split_extensions(suffixes)
    if _reader_of(found[0]) is None:
        rotated = _split_extensions([suffix for suffix in suffixes if not ROTATED.fullmatch(suffix)])
        return rotated if _reader_of(rotated[0]) else found
    return found


def _suffixes(name: str) -> list[str]:
    return name.rsplit("/", 1)[-1].lower().split(".")[1:]


def _split_extensions(suffixes: list[str]) -> tuple[str, str | None]:
    compression = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSIONS else None
    rest = suffixes[:-1] if compression else suffixes
    return (rest[-1] if rest else ""), compression


def _listed(extensions: Iterable[str]) -> str:
    *first, last = (f".{extension}" for extension in extensions)
    return f"{', '.join(first)} or {last}"
