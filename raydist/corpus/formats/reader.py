"""A file format as a Reader, and the ways to split files that several formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from raydist.corpus.formats.records import Item, Part, ReadOptions
from raydist.corpus.formats.streams import HEAD_BYTES, Opened, other_encoding

SEARCHED_BYTES = 64 * 1024


class Cut(NamedTuple):
    """A part of a file, `start` and `end` as in Part. n_bytes: of the file, about."""

    start: int
    end: int
    n_bytes: int


@dataclass(frozen=True)
class Reader:
    """A file format.

    name: of the format, as in a job's `format`.
    extensions: of its files' names, in lower case, without the dot.
    read: the items of a part in the file's order, in lists of about CHUNK_BYTES of text. It raises Torn where
    the content ends too early; the items before are kept.
    cut: splits an uncompressed file into parts of about n_bytes; [] if this file has to be read as a whole.
    None: so has every file of the format.
    has_columns: the text is one column of several, so it can be missing.
    may_be_compressed: a compression's extension may follow its own. Formats that are read at random places
    cannot be.
    compresses: its files are as a rule compressed inside, so that they hold more text than their size.
    unit, count: what a part counts, and how many a file has; 0 if it is damaged. Only of formats that native
    code decodes: see the module `decoder`.
    """

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Opened, Part, ReadOptions], Iterator[list[Item]]]
    cut: Callable[[Opened, int, ReadOptions], list[Cut]] | None = None
    has_columns: bool = True
    may_be_compressed: bool = True
    compresses: bool = False
    unit: str = ""
    count: Callable[[Opened], int] | None = None


def cut_units(sizes: Sequence[float], n_bytes: int) -> list[Cut]:
    """Parts of whole units (row groups, record batches) of `sizes` bytes each; [] for one unit or none."""
    groups = group_neighbours(sizes, n_bytes) if len(sizes) > 1 else ()
    return [Cut(start, end, round(size)) for start, end, size in groups]


def group_neighbours(sizes: Sequence[float], n_bytes: int) -> Iterator[tuple[int, int, float]]:
    """(start, end, size) of groups of neighbours: as many as fit into n_bytes, at least one."""
    start, held = 0, 0.0
    for i, size in enumerate(sizes):
        if i > start and held + size > n_bytes:
            yield start, i, held
            start, held = i, 0.0
        held += size
    if sizes:
        yield start, len(sizes), held


def cut_bytes(
    stream: Opened, n_bytes: int, find_ends: Callable[[Opened, list[int]], Iterable[int]]
) -> list[Cut]:
    """Byte ranges of about equal size. find_ends(stream, targets): where a record ends, after each target.

    None of a file that is not UTF-8: read as a whole, it is one bad file.
    """
    stream.seek(0)
    if other_encoding(stream.read(HEAD_BYTES)):
        return []
    size = stream.file.size
    count = -(-size // n_bytes)
    ends = find_ends(stream, [size * i // count for i in range(1, count)])
    edges = sorted({0, *ends, size})
    return [Cut(start, end, end - start) for start, end in pairwise(edges)]


def cut_lines(stream: Opened, n_bytes: int) -> list[Cut]:
    """Byte ranges that end where a line does."""
    return cut_bytes(
        stream, n_bytes, lambda stream, targets: [_line_end(stream, target) for target in targets]
    )


def _line_end(stream: Opened, target: int) -> int:
    return search(stream, target, lambda window, searched: window.find(b"\n", searched) + 1)


def search(stream: Opened, target: int, find: Callable[[bytes, int], int]) -> int:
    """The first place after `target` that `find` finds, or the file's end.

    find(window, searched): an end within the window, or 0 if there is none. The window begins at `target`
    and grows; nothing ended in its first `searched` bytes.
    """
    stream.seek(target)
    window, step = b"", SEARCHED_BYTES
    while block := stream.read(step):
        window += block
        if end := find(window, len(window) - len(block)):
            return target + end
        step = max(step, len(window))
    return stream.file.size
