"""Slices: the units of work of a token log, planned from the files before any record is read.

    files -> parts (byte ranges, row groups, whole files) -> slices of about slice_bytes, in a hashed order

The plan is a pure function of the files, the options and slice_bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from raydist.corpus.formats import Item, Part, ReadOptions, cut_file, read_part
from raydist.corpus.formats.reader import group_neighbours
from raydist.corpus.formats.records import CHUNK_BYTES
from raydist.corpus.locations import File

MAX_PARTS = 16384
"""Of a slice: a small file takes its time however few bytes it has, and one task reads a slice."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Parts that one task reads, in this order. n_bytes: of the source files, about."""

    parts: tuple[Part, ...]
    n_bytes: int


def to_json(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    return [{"parts": [[p.file, p.start, p.end] for p in s.parts], "n_bytes": s.n_bytes} for s in slices]


def from_json(value: Sequence[dict[str, Any]]) -> list[Slice]:
    return [Slice(tuple(Part(*part) for part in entry["parts"]), entry["n_bytes"]) for entry in value]


def plan_slices(files: Sequence[File], options: ReadOptions, slice_bytes: int) -> list[Slice]:
    """Large files are split, small parts share a slice. The order is by hash, so that files mix."""
    single: list[Slice] = []
    for index, file in enumerate(files):
        cuts = cut_file(file, slice_bytes, options)
        single += [Slice((Part(index, cut.start, cut.end),), cut.n_bytes) for cut in cuts]
        if not cuts:
            single.append(Slice((Part(index),), file.size))
    single.sort(key=lambda entry: _hash(files, entry))
    slices = [entry for entry in single if entry.n_bytes > slice_bytes // 2]
    small = [entry for entry in single if entry.n_bytes <= slice_bytes // 2]
    for start, end, _ in group_neighbours([entry.n_bytes for entry in small], slice_bytes):
        for first in range(start, end, MAX_PARTS):
            some = small[first : min(first + MAX_PARTS, end)]
            slices.append(
                Slice(tuple(entry.parts[0] for entry in some), sum(entry.n_bytes for entry in some))
            )
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
    """A sort key: a hash of the slice's text, then the text itself, for equal hashes."""
    text = "\n".join(f"{files[part.file].name}\0{part.start}\0{part.end}" for part in entry.parts)
    return xxhash.xxh3_64_intdigest(text.encode()), text
