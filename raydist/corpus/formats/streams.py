"""Bytes of a file: opened, decompressed, in blocks, and in chunks of whole lines."""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from itertools import chain
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import zstandard

from raydist.corpus.formats.records import CHUNK_BYTES, MAX_RECORD_BYTES, UTF_8, WHOLE, Part, Torn, too_long
from raydist.corpus.locations import File, cannot_read, open_file
from raydist.errors import CorpusError

MOST_WINDOW_BYTES = 2**31
"""Of a zstd frame, as `zstd --long=31` makes it. So much memory is the most that decompressing takes."""
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES).decompressobj(),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
COMPRESSIONS = (*DECOMPRESSORS, "lz4")
"""By the extension that follows the format's own, as in a.jsonl.gz."""

BOM = b"\xef\xbb\xbf"
FED_BYTES = {"gz": 64 * 1024}
FEWER_FED_BYTES = 4 * 1024
"""Compressed bytes that are decompressed at once: what they expand to fits in memory."""
BROKEN = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError)
PADDED = ("gz", "xz")
"""Zeros may follow a member of the file."""
MARKS = {"utf-16": (b"\xff\xfe", b"\xfe\xff"), "utf-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff")}
"""With which text begins that says its byte order itself."""
HEAD_BYTES = 4096
"""Of a file's start, by which UTF-16 is recognised."""


class Opened:
    """A file's stream. Storage that fails raises CorpusError, and so is never taken for damaged content.

    encoding: of the text in it.  at_end: the last read found nothing left.  stream: if it is open already.
    """

    def __init__(self, file: File, encoding: str = UTF_8, stream: BufferedIOBase | None = None) -> None:
        self.file, self.encoding, self.at_end = file, encoding, False
        try:
            self.stream = stream or open_file(file.location)
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
    """(offset in the decompressed file, block of about CHUNK_BYTES), as UTF-8 without a byte order mark.

    Offsets are of the text as UTF-8, also in a file of another encoding, which `part` has to be the whole of.

    Torn: the content is damaged from here on, or it is not UTF-8 from its start.
    """
    offset = part.start
    content = _content(stream, part)
    for block in content if stream.encoding == UTF_8 else _as_utf8(content, stream.encoding):
        if offset == 0 and (encoding := other_encoding(block)):
            raise Torn(
                f"it is {encoding} text: set the source's encoding, or convert it,"
                f" as by iconv -f {encoding} -t UTF-8 {stream.file.name.rsplit('/', 1)[-1]!r} > NEW"
            )
        if offset == 0 and block.startswith(BOM):
            offset, block = len(BOM), block[len(BOM) :]
        yield offset, block
        offset += len(block)


def _as_utf8(content: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Torn: bytes that the encoding does not have, after the text before them; or no byte order mark."""
    decoder, marks = codecs.getincrementaldecoder(encoding)(), MARKS.get(encoding)
    for block in chain(content, [b""]):
        if marks and block and not block.startswith(marks):
            raise Torn(
                f"no byte order mark of {encoding}: set the encoding to {encoding}-le or {encoding}-be"
            )
        marks = None
        state = decoder.getstate()
        try:
            yield decoder.decode(block, final=not block).encode()
        except UnicodeDecodeError as error:
            decoder.setstate(state)
            yield decoder.decode(block[: max(0, error.start - len(state[0]))]).encode()
            raise Torn(f"invalid {encoding}: {error.reason}; what follows was not read") from error


def other_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 if the first bytes of a file say so: by their mark, or as every second one is NUL."""
    if start.startswith(MARKS["utf-32"]):
        return "UTF-32"
    if start.startswith(MARKS["utf-16"]):
        return "UTF-16"
    head = start[: min(HEAD_BYTES, len(start) // 2 * 2)]
    big, little = head[::2].count(0), head[1::2].count(0)
    if max(big, little) < max(2, 0.3 * len(head) / 2) or min(big, little) > 0.1 * max(big, little):
        return None
    return "UTF-16LE" if little > big else "UTF-16BE"


def _content(stream: Opened, part: Part) -> Iterator[bytes]:
    stream.seek(part.start)
    if stream.file.compression:
        is_lz4 = stream.file.compression == "lz4"
        yield from _gathered(_read_lz4(stream) if is_lz4 else _decompressed(stream, stream.file.compression))
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
    """Every member of the file, one after the other."""
    decoder, fresh = DECOMPRESSORS[compression](), True
    fed = FED_BYTES.get(compression, FEWER_FED_BYTES)
    while raw := stream.read(CHUNK_BYTES):
        for start in range(0, len(raw), fed):
            pending = raw[start : start + fed]
            while pending:
                if fresh and compression in PADDED:
                    pending = pending.lstrip(b"\0")
                    if not pending:
                        break
                fresh = False
                before = decoder.copy() if compression == "gz" else None
                try:
                    yield decoder.decompress(pending)
                except BROKEN as error:
                    if before and re.search(r"incorrect (data|length) check", str(error)):
                        yield from _before_checksum(before, pending)
                        raise Torn(
                            "damaged .gz: a checksum is not that of the content before it, which was kept;"
                            " what follows was not read"
                        ) from error
                    raise Torn(f"damaged .{compression}: {error}") from error
                pending = b""
                if decoder.eof:
                    pending = decoder.unused_data
                    decoder, fresh = DECOMPRESSORS[compression](), True
    if not fresh:
        raise Torn(f"truncated .{compression}: it ends within its content")


def _before_checksum(decoder: Any, pending: bytes) -> Iterator[bytes]:
    """What `pending` holds up to the checksum that is wrong."""
    for position in range(len(pending)):
        try:
            yield decoder.decompress(pending[position : position + 1])
        except zlib.error:
            return


class _Lent:
    """A stream that stays open when pyarrow closes it, as it does at the end: CSV is read twice."""

    def __init__(self, stream: Opened) -> None:
        self.read, self.closed = stream.read, False

    def close(self) -> None:
        pass


def _read_lz4(stream: Opened) -> Iterator[bytes]:
    lent = cast(IO[bytes], _Lent(stream))
    source = pa.CompressedInputStream(pa.PythonFile(lent, mode="r"), "lz4")
    try:
        while block := source.read(CHUNK_BYTES):
            yield block
    except OSError as error:
        raise Torn(f"damaged .lz4: {error}") from error


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


def whole_lines(
    content: Iterable[tuple[int, bytes]], limit: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, bytes]]:
    """(offset, chunk) of chunks that end with \\n, except the last of a file that does not end so.

    Torn: a line is longer than `limit`, about.
    """
    for offset, chunk in lines_but_long_ones(content, limit):
        if chunk is None:
            raise Torn(f"{too_long('a line', limit)} starts at byte {offset}")
        yield offset, chunk


def lines_but_long_ones(
    content: Iterable[tuple[int, bytes]], limit: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """The same, and (offset, None) of a line that is longer, which is not held in memory."""
    held: list[bytes] = []
    start = size = 0
    inside_long = False
    for offset, block in content:
        if inside_long:
            end = block.find(b"\n") + 1
            if not end or end == len(block):
                inside_long = not end
                continue
            offset, block, inside_long = offset + end, block[end:], False
        start = start if held else offset
        cut = block.rfind(b"\n") + 1
        if not cut:
            held.append(block)
            size += len(block)
            if size > limit:
                yield start, None
                held, size, inside_long = [], 0, True
            continue
        yield start, b"".join((*held, block[:cut]))
        held, start = ([block[cut:]] if cut < len(block) else []), offset + cut
        size = len(block) - cut
    if held:
        yield start, b"".join(held)


def lines_of(offset: int, chunk: bytes) -> tuple[list[bytes], list[int]]:
    """The lines of a chunk without their \\n, and where each starts."""
    lines = chunk.removesuffix(b"\n").split(b"\n")
    ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
    return lines, [offset, *(ends[:-1] + offset).tolist()]
