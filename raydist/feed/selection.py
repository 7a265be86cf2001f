"""The documents that training leaves out: held out for evaluation, or with a text that occurred before.

Repeated texts are found by hash over all token logs of a run, once, and the result is kept on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints, TokenLog, held_out
from raydist.feed.cache import cached_array, pack_index_folder, verified

DOCUMENTS_AT_ONCE = 1 << 24
"""Hashes held in memory: about 1 GB while they are sorted. More documents take several passes."""

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Selection:
    """The documents of one token log that training leaves out. Methods give bool [N], N documents of a shard.

    holdout: share held out for evaluation, by hash.  duplicates: numbers of the documents whose text occurred
    before, ascending int64, counted through the token log; None where they are trained on.  name: a hash of
    the token logs, which decide what a duplicate is.
    """

    log: TokenLog
    holdout: float
    duplicates: Ints | None = None
    name: str = ""

    @property
    def identity(self) -> list[Any]:
        """What decides the selection, apart from the token log. It enters the name of the pack index."""
        return [self.holdout] if self.duplicates is None else [self.holdout, self.name]

    def held_out(self, shard: int) -> NDArray[np.bool_]:
        return held_out(self.log.shards[shard].hashes(), self.holdout)

    def repeated(self, shard: int) -> NDArray[np.bool_]:
        """Whether each document's text occurred before; held-out documents among them."""
        rows = np.zeros(self.log.shards[shard].n_documents, bool)
        if self.duplicates is not None:
            start = int(self._ends[shard]) - len(rows)
            first, last = np.searchsorted(self.duplicates, [start, start + len(rows)])
            rows[self.duplicates[first:last] - start] = True
        return rows

    @cached_property
    def _ends(self) -> Ints:
        """Documents up to the end of each shard."""
        return np.cumsum([shard.n_documents for shard in self.log.shards], dtype=np.int64)


def select(logs: Sequence[TokenLog], holdout: float, *, dedup: bool) -> list[Selection]:
    """A selection for each token log. dedup: leave out documents whose text occurred before."""
    if not dedup:
        return [Selection(log, holdout) for log in logs]
    pairs = zip(logs, duplicates(logs), strict=True)
    return [Selection(log, holdout, rows, _name(logs)) for log, rows in pairs]


def duplicates(logs: Sequence[TokenLog]) -> list[Ints]:
    """For each token log the numbers of its documents whose text occurred before, in it or in an earlier one.

    Ascending int64, counted through the token log. Texts are equal where all 128 bits of their hashes are.
    """
    counts = [log.n_documents for log in logs]
    if not sum(counts):
        return [np.zeros(0, np.int64) for _ in logs]
    n_ranges = _n_ranges(logs)
    found = cached_array(
        pack_index_folder(logs[0]) / f"{_name(logs)}-duplicates" / "all.pack",
        lambda: np.sort(np.concatenate([_repeated(logs, nth, n_ranges) for nth in range(n_ranges)])),
    )
    starts = np.concatenate([[0], np.cumsum(counts)])
    edges = np.searchsorted(found, starts)
    return [found[a:b] - start for a, b, start in zip(edges, edges[1:], starts, strict=False)]


def unique_share(logs: Sequence[TokenLog]) -> float:
    """Share of the documents whose text did not occur before.

    Of many documents only those in one range of hashes are counted: equal texts are in the same range.
    """
    n_ranges = max(1, _n_ranges(logs))

    def count() -> Ints:
        looked_at = sum(len(rows) for _, _, rows in _hashes(logs, 0, n_ranges))
        return np.array([looked_at, len(_repeated(logs, 0, n_ranges))])

    path = pack_index_folder(logs[0]) / f"{_name(logs)}-duplicates" / "share.pack"
    looked_at, repeated = cached_array(path, count).tolist()
    return float(1 - repeated / max(1, looked_at))


def _n_ranges(logs: Sequence[TokenLog]) -> int:
    """Ranges of hashes, one for each pass over the token logs."""
    return -(-sum(log.n_documents for log in logs) // DOCUMENTS_AT_ONCE)


def _name(logs: Sequence[TokenLog]) -> str:
    """A hash of the token logs, in order: they decide which document is the first with its text."""
    return xxhash.xxh3_64_hexdigest(orjson.dumps([log.fingerprint for log in logs]))


def _repeated(logs: Sequence[TokenLog], nth: int, n_ranges: int) -> Ints:
    """The documents in one range of hashes that repeat an earlier one, numbered through all token logs."""
    columns = list(_hashes(logs, nth, n_ranges))
    if not columns:
        return np.zeros(0, np.int64)
    high, low, rows = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    ordered = np.sort(high)
    candidates = np.flatnonzero(np.isin(high, ordered[1:][ordered[1:] == ordered[:-1]]))  # few, as a rule
    high, low, rows = high[candidates], low[candidates], rows[candidates]
    order = np.lexsort((low, high))  # stable: equal ones stay in the order of their documents
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    repeated: Ints = rows[order[1:][same]]
    return repeated


def _hashes(logs: Sequence[TokenLog], nth: int, n_ranges: int) -> Iterator[tuple[Words, Words, Ints]]:
    """For each shard: both halves of the hashes in the nth of n_ranges ranges, and the documents' numbers."""
    first, width = 0, -(-(1 << 64) // n_ranges)
    for log in logs:
        for shard in log.shards:
            high, low = verified(shard).hash_halves()
            in_range = high // np.uint64(width) == nth if n_ranges > 1 else np.ones(len(high), bool)
            rows = np.flatnonzero(in_range)
            yield high[rows], low[rows], first + rows
            first += shard.n_documents
