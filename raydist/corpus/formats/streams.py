"""Bytes of a file: opened, decompressed, in blocks, and in chunks of whole lines."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import zstandard

from raydist.corpus.formats.records import CHUNK_BYTES, WHOLE, Part, Torn
from raydist.corpus.locations import File, cannot_read, open_file
from raydist.errors import CorpusError

DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "bz2": bz2.BZ2Decompressor,
}
"""By the extension that follows the format's own, as in a.jsonl.gz."""

BOM = b"\xef\xbb\xbf"
FED_BYTES = 64 * 1024
"""Compressed bytes that are decompressed at once: what they expand to fits in memory."""
BROKEN = (zlib.error, zstandard.ZstdError, OSError, EOFError)


class Opened:
    """A file's stream. Storage that fails raises CorpusError, and so is never taken for damaged content.

    at_end: the last read found nothing left.
    """

    def __init__(self, file: File) -> None:
        self.file, self.at_end = file, False
        try:
            self.stream = open_file(file.location)
        except OSError as error:
            cannot_read(error, file.location, file.name)

    def read(self, size: int = -1) -> bytes:
        try:
            block = self.stream.read(size)
        except OSError as error:
            cannot_read(error, self.file.location, self.file.name)
        self.at_end = size != 0 and not block
        return block

    def seek(self, position: int, whence: int = 0) -> int:
        return self.stream.seek(position, whence)

    def tell(self) -> int:
        return self.stream.tell()

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def blocks(stream: Opened, part: Part = WHOLE) -> Iterator[tuple[int, bytes]]:
    """(offset in the decompressed file, block of about CHUNK_BYTES), without a byte order mark.

    Torn: the content is damaged from here on.
    """
    offset = part.start
    for block in _content(stream, part):
        if offset == 0 and block.startswith(BOM):
            offset, block = len(BOM), block[len(BOM) :]
        yield offset, block
        offset += len(block)


def _content(stream: Opened, part: Part) -> Iterator[bytes]:
    stream.seek(part.start)
    if stream.file.compression:
        yield from _gathered(_decompressed(stream, stream.file.compression))
        return
    left = (stream.file.size if part.is_whole else part.end) - part.start
    while left and (block := stream.read(min(CHUNK_BYTES, left))):
        left -= len(block)
        yield block
    if left:
        raise CorpusError(
            f"{stream.file.name} became {left} bytes shorter",
            where=stream.file.location,
            why="it changed after it was planned",
            fix="run again once nothing writes to it",
        )


def _decompressed(stream: Opened, compression: str) -> Iterator[bytes]:
    """Every member of the file, one after the other. Zeros between gzip members are padding."""
    decoder, fresh = DECOMPRESSORS[compression](), True
    while raw := stream.read(CHUNK_BYTES):
        for start in range(0, len(raw), FED_BYTES):
            pending = raw[start : start + FED_BYTES]
            while pending:
                if fresh and compression == "gz":
                    pending = pending.lstrip(b"\0")
                    if not pending:
                        break
                fresh = False
                try:
                    yield decoder.decompress(pending)
                except BROKEN as error:
                    raise Torn(f"damaged .{compression}: {error}") from error
                pending = b""
                if decoder.eof:
                    pending = decoder.unused_data
                    decoder, fresh = DECOMPRESSORS[compression](), True
    if not fresh:
        raise Torn(f"truncated .{compression}: it ends within its content")


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Joins small pieces into blocks. Before Torn is raised, it gives what came before the damage."""
    held: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= CHUNK_BYTES:
                yield b"".join(held)
                held, size = [], 0
    except Torn:
        yield b"".join(held)
        raise
    yield b"".join(held)


def whole_lines(content: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """(offset, chunk) of chunks that end with \\n, except the last of a file that does not end so."""
    held: list[bytes] = []
    start = 0
    for offset, block in content:
        start = start if held else offset
        cut = block.rfind(b"\n") + 1
        if not cut:
            held.append(block)
            continue
        yield start, b"".join((*held, block[:cut]))
        held, start = ([block[cut:]] if cut < len(block) else []), offset + cut
    if held:
        yield start, b"".join(held)


def lines_of(offset: int, chunk: bytes) -> tuple[list[bytes], list[int]]:
    """The lines of a chunk without their \\n, and where each starts."""
    lines = chunk.removesuffix(b"\n").split(b"\n")
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
    return lines, [offset, *(ends[:-1] + offset).tolist()]
