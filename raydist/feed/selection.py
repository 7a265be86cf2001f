"""Documents whose text occurred before: found by hash over all logs of a run, once, and remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints, TokenLog
from raydist.feed.pack_index import cached_array, pack_index_folder

DOCUMENTS_AT_ONCE = 1 << 24
"""Hashes held in memory: about 1 GB with what sorting them takes. More documents take several passes."""

Words = NDArray[np.uint64]


def duplicates(logs: Sequence[TokenLog]) -> list[Ints]:
    """For each log the numbers of its documents whose text stands earlier, in it or in a log before it.

    Ascending int64, counted through the log. Text is equal where all 128 bits of its hash are.
    """
    counts = [log.n_documents for log in logs]
    if not sum(counts):
        return [np.zeros(0, np.int64) for _ in logs]
    passes = _passes(logs)
    found = cached_array(
        _folder(logs) / "all.pack",
        lambda: np.sort(np.concatenate([_repeated(logs, turn, passes) for turn in range(passes)])),
    )
    begins = np.concatenate([[0], np.cumsum(counts)])
    cuts = np.searchsorted(found, begins)
    return [found[a:b] - begin for a, b, begin in zip(cuts, cuts[1:], begins, strict=False)]


def unique_share(logs: Sequence[TokenLog]) -> float:
    """Share of the documents whose text did not occur before.

    Of many documents only those in one range of hashes are looked at: equal texts are in it together.
    """
    passes = max(1, _passes(logs))

    def count() -> Ints:
        looked_at = sum(len(rows) for _, _, rows in _hashes(logs, 0, passes))
        return np.array([looked_at, len(_repeated(logs, 0, passes))])

    looked_at, repeated = cached_array(_folder(logs) / "share.pack", count).tolist()
    return float(1 - repeated / max(1, looked_at))


def _passes(logs: Sequence[TokenLog]) -> int:
    return -(-sum(log.n_documents for log in logs) // DOCUMENTS_AT_ONCE)


def _folder(logs: Sequence[TokenLog]) -> Path:
    name = xxhash.xxh3_64_hexdigest(orjson.dumps(fingerprints(logs)))
    return pack_index_folder(logs[0]) / f"{name}-duplicates"


def fingerprints(logs: Sequence[TokenLog]) -> list[str]:
    """What decides which document is the first of its text: the logs, in order."""
    return [log.fingerprint for log in logs]


def _repeated(logs: Sequence[TokenLog], turn: int, passes: int) -> Ints:
    """Of the documents in one range of hashes, those that repeat an earlier one: numbers over all logs."""
    columns = list(_hashes(logs, turn, passes))
    if not columns:
        return np.zeros(0, np.int64)
    high, low, rows = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    ordered = np.sort(high)
    again = np.flatnonzero(np.isin(high, ordered[1:][ordered[1:] == ordered[:-1]]))  # few, as a rule
    high, low, rows = high[again], low[again], rows[again]
    order = np.lexsort((low, high))  # stable: equal ones stay in the order of their documents
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    repeated: Ints = rows[order[1:][same]]
    return repeated


def _hashes(logs: Sequence[TokenLog], turn: int, passes: int) -> Iterator[tuple[Words, Words, Ints]]:
    """Of each shard: both halves of the hashes in the range `turn` of `passes`, and their documents."""
    first, width = 0, -(-(1 << 64) // passes)
    for log in logs:
        for shard in log.shards:
            high, low = shard.hash_halves()
            rows = np.flatnonzero(high // np.uint64(width) == turn) if passes > 1 else np.arange(len(high))
            yield high[rows], low[rows], first + rows
            first += shard.n_documents
