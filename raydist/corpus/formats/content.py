"""The format of a file by its content, where its name says none."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

import orjson

from raydist.corpus.formats.records import Torn
from raydist.corpus.formats.streams import Opened, blocks
from raydist.corpus.formats.table import FileFormat
from raydist.corpus.locations import File

START_BYTES = 8
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""What a file begins with; the last is an Arrow stream."""
COMPRESSED = {
    b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4",
    b"BZh": "bz2",
}  # fmt: skip
JSON_ARRAY = re.compile(rb"\[\s*[\]{]")
JSON_OBJECT = re.compile(rb'\{\s*["}]')


def recognise(name: str, location: str, size: int, encoding: str) -> FileFormat | None:
    """A table by its first bytes, JSON by its first line, else text; None if it is none of these.

    encoding: of text, as the source says. CorpusError: the file cannot be read.
    """
    with Opened(File(name, location, size, "", "", None)) as stream:
        start = stream.read(START_BYTES)
    table = next((format_ for magic, format_ in TABLES.items() if start.startswith(magic)), None)
    if table:
        return FileFormat(table, None)
    compression = next((known for magic, known in COMPRESSED.items() if start.startswith(magic)), None)
    with Opened(File(name, location, size, "", "", compression), encoding) as stream:
        try:
            head = next(blocks(stream), (0, b""))[1]
        except Torn:
            return None
    kind = _of_text(head)
    return FileFormat(kind, compression) if kind else None


def _of_text(head: bytes) -> str | None:
    """head: the start of a file, as UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    if b"\0" in head or any(head.startswith(magic) for magic in TABLES):
        return None
    text = head.lstrip()
    if JSON_ARRAY.match(text):
        return "json"
    if JSON_OBJECT.match(text):
        with suppress(orjson.JSONDecodeError):
            orjson.loads(text.partition(b"\n")[0])
            return "jsonl"
        return "json"
    return "text"
