"""Slices: the units of work of a token log, planned from the files before anything is read.

    files -> parts (byte ranges, row groups, whole files) -> slices of about slice_bytes, in a hashed order

The plan is a pure function of the files, the options and slice_bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from raydist.corpus.files import File
from raydist.corpus.formats import Item, Part, ReadOptions, columns, layout, read_part
from raydist.corpus.formats.csv import delimiter_of
from raydist.corpus.formats.records import CHUNK_BYTES
from raydist.corpus.formats.streams import Opened, blocks
from raydist.corpus.formats.text import BLANK_LINES

SEARCHED_BYTES = 64 * 1024


@dataclass(frozen=True)
class Slice:
    """Parts that one task reads in this order. n_bytes: of the source files, about."""

    parts: tuple[Part, ...]
    n_bytes: int


def to_json(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    return [{"parts": [[p.file, p.start, p.end] for p in s.parts], "n_bytes": s.n_bytes} for s in slices]


def from_json(value: Sequence[dict[str, Any]]) -> list[Slice]:
    return [Slice(tuple(Part(*part) for part in entry["parts"]), entry["n_bytes"]) for entry in value]


def plan_slices(files: Sequence[File], options: ReadOptions, slice_bytes: int) -> list[Slice]:
    """Large files are split, small parts share a slice; order is by hash, so that neighbours mix."""
    single = [part for index, file in enumerate(files) for part in _parts(index, file, options, slice_bytes)]
    single.sort(key=lambda entry: _hash(files, entry))
    slices = [entry for entry in single if entry.n_bytes > slice_bytes // 2]
    small = [entry for entry in single if entry.n_bytes <= slice_bytes // 2]
    for start, end, n_bytes in _groups([entry.n_bytes for entry in small], slice_bytes):
        slices.append(Slice(tuple(entry.parts[0] for entry in small[start:end]), round(n_bytes)))
    return sorted(slices, key=lambda entry: _hash(files, entry))


def read_slice(files: Sequence[File], entry: Slice, options: ReadOptions) -> Iterator[list[tuple[int, Item]]]:
    """Lists of (index of the file, item), about 4 MiB of text each."""
    held: list[tuple[int, Item]] = []
    size = 0
    for part in entry.parts:
        for items in read_part(files[part.file], part, options):
            held += [(part.file, item) for item in items]
            size += sum(len(item[0]) for item in items if isinstance(item[0], str))
            if size >= CHUNK_BYTES // 2:
                yield held
                held, size = [], 0
    if held:
        yield held


def _hash(files: Sequence[File], entry: Slice) -> tuple[int, str]:
    """Sorts by hash; the text itself decides between equal hashes."""
    text = "\n".join(f"{files[part.file].name}\0{part.start}\0{part.end}" for part in entry.parts)
    return xxhash.xxh3_64_intdigest(text.encode()), text


def _groups(sizes: Sequence[float], slice_bytes: int) -> Iterator[tuple[int, int, float]]:
    """(start, end, size) of neighbours, as many as fit into slice_bytes, at least one."""
    start, held = 0, 0.0
    for i, size in enumerate(sizes):
        if i > start and held + size > slice_bytes:
            yield start, i, held
            start, held = i, 0.0
        held += size
    if sizes:
        yield start, len(sizes), held


def _parts(index: int, file: File, options: ReadOptions, slice_bytes: int) -> list[Slice]:
    """The file as slices of one part each."""
    whole = [Slice((Part(index),), file.size)]
    if file.size <= slice_bytes:
        return whole
    kind, compression = layout(file, options)
    if kind in ("parquet", "arrow"):
        sizes = _group_sizes(file, kind)
        groups = _groups(sizes, slice_bytes)
        return [Slice((Part(index, a, b),), round(n)) for a, b, n in groups] if len(sizes) > 1 else whole
    if compression or kind == "json" or (kind == "text" and options.document == "file"):
        return whole
    count = -(-file.size // slice_bytes)
    targets = [file.size * i // count for i in range(1, count)]
    with Opened(file) as stream:
        if kind == "csv":
            cuts = list(_record_ends(stream, targets))
        else:
            blank = kind == "text" and options.document == "paragraph"
            cuts = [_line_end(stream, target, file.size, blank=blank) for target in targets]
    edges = sorted({0, *cuts, file.size})
    return [Slice((Part(index, a, b),), b - a) for a, b in pairwise(edges)]


# --- row groups and record batches


def _group_sizes(file: File, kind: str) -> list[float]:
    """Bytes of the file that each row group or record batch takes, about; [] if the file cannot be read."""
    with Opened(file) as stream:
        try:
            if kind == "parquet":
                meta = columns.open_parquet(stream).metadata
                sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
                return [size * file.size / max(1, sum(sizes)) for size in sizes]
            reader = columns.open_arrow(stream)
            n_batches = reader.num_record_batches if columns.is_file(reader) else 0
            return [file.size / n_batches] * n_batches
        except columns.DAMAGED:
            return []


# --- places where a text file can be cut


def _line_end(stream: Opened, target: int, size: int, *, blank: bool) -> int:
    """The first position after `target` where a line, or with `blank` a run of blank lines, has ended."""
    stream.seek(target)
    window, step = b"", SEARCHED_BYTES
    while block := stream.read(step):
        window += block
        if blank:
            match = BLANK_LINES.search(window)
            end = match.end() if match else 0
        else:
            end = window.find(b"\n", len(window) - len(block)) + 1
        if end:
            return target + end
        step = max(step, len(window))
    return size


def _record_ends(stream: Opened, targets: Sequence[int]) -> Iterator[int]:
    """The first line end after each target that is provably outside quotes, scanning the whole CSV once.

    A quote counts as opening or closing by turns. That is how csv reads them as long as each opening
    quote follows a field's start and each closing one a field's end; past the first that does not,
    nothing is proven and the file is not cut.
    """
    remaining, inside, comma = list(targets), 0, ord(delimiter_of(stream.file.name))
    ends = np.array([comma, *b'\n\r"'], np.uint8)  # a quote beside a quote is one, escaped
    for offset, around in _with_neighbours(stream):
        data = np.frombuffer(around, np.uint8)
        quotes = np.flatnonzero(data[1:-1] == ord('"')) + 1
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
    """(offset, block with the byte before and the byte after it); line ends stand around the file."""
    before, held, offset = b"\n", b"", 0
    for start, block in blocks(stream, Part(0), None):
        if held:
            yield offset, before + held + block[:1]
            before = held[-1:]
        held, offset = block, start
    if held:
        yield offset, before + held + b"\n"
