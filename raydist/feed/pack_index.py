"""A token log under one packing: the index of each shard, made once and kept next to the token logs.

    <storage>/.packs/<log>-<packing>/counts          a row per shard; with it, a feed opens without any index
                                     <shard>.pack    the shard's PackIndex

The token log itself is never touched: it is the same whoever trains on it. Everything in .packs can be
deleted: it is made again when it is missing or damaged.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints, TokenLog, held_out
from raydist.feed.packing import REVISION, PackIndex, pack
from raydist.files import replacing
from raydist.job.schema import Packing
from raydist.storage import Storage

_TOTALS: dict[tuple[Path, str], list[int]] = {}
"""Totals of the shards that this process has counted, by folder and name."""


class Totals(NamedTuple):
    """Sums of each shard, int64[S]. tokens: document tokens, without EOS."""

    blocks: Ints
    tokens: Ints
    eos: Ints
    padding: Ints
    labels: Ints
    held_out_documents: Ints
    held_out_tokens: Ints
    duplicate_documents: Ints
    duplicate_tokens: Ints


@dataclass(frozen=True)
class FeedSource:
    """weight: share of the samples; all sources of a feed have one, or none has."""

    name: str
    log: TokenLog
    weight: float | None = None


class PackedSource:
    """Opening reads one small file, or, the first time, the length and hash columns of every shard.

    n_blocks hold n_tokens (without EOS) and n_eos. Left out are held_out_documents and held_out_tokens, and,
    of the others, duplicate_documents and duplicate_tokens.

    repeats: None, or the numbers of the documents that are duplicates, ascending, and a name for them.
    """

    def __init__(
        self, source: FeedSource, packing: Packing, holdout: float, repeats: tuple[Ints, str] | None = None
    ) -> None:
        self.name, self.log, self.weight = source.name, source.log, source.weight
        self.packing, self.holdout = packing, holdout
        self._repeats = repeats[0] if repeats else None
        of = repeats[1] if repeats else ""
        self._ends = np.cumsum([shard.n_documents for shard in self.log.shards], dtype=np.int64)
        # Named by all that decides which inputs are in which block.
        parts = packing.model_dump(include={"block_size", "strategy", "add_eos_token"})
        identity = orjson.dumps([REVISION, parts, holdout, *of.split()], option=orjson.OPT_SORT_KEYS)
        name = f"{self.log.fingerprint}-{xxhash.xxh3_64_hexdigest(identity)}"
        self.folder = pack_index_folder(self.log) / name
        # those of a token log that grows are not kept: there will be more of them
        complete = self.log.complete
        rows = cached_array(self.folder / "counts", self._make_totals) if complete else self._make_totals()
        self.totals = Totals(*rows.reshape(len(self.log.shards), len(Totals._fields)).T)
        sums = [int(column.sum()) for column in self.totals]
        self.n_blocks, self.n_tokens, self.n_eos = sums[:3]
        self.held_out_documents, self.held_out_tokens = sums[5:7]
        self.duplicate_documents, self.duplicate_tokens = sums[7:]

    def index(self, shard: int) -> PackIndex:
        """Memory-mapped; made again if it is missing or damaged."""
        path = self.folder / f"{Path(self.log.shards[shard].name).stem}.pack"
        return PackIndex.from_flat(cached_array(path, lambda: self._pack(shard).flat()))

    def _pack(self, shard: int) -> PackIndex:
        lengths, keep = self.log.shards[shard].lengths(), ~(self._held_out(shard) | self._repeated(shard))
        size, strategy, eos = self.packing.block_size, self.packing.strategy, self.packing.add_eos_token
        return pack(lengths, keep, block_size=size, strategy=strategy, eos=eos)

    def _held_out(self, shard: int) -> NDArray[np.bool_]:
        return held_out(self.log.shards[shard].hashes(), self.holdout)

    def _repeated(self, shard: int) -> NDArray[np.bool_]:
        """Which documents of the shard are left out because their text occurred before."""
        repeated = np.zeros(self.log.shards[shard].n_documents, bool)
        if self._repeats is not None:
            end = int(self._ends[shard])
            first, last = np.searchsorted(self._repeats, [end - len(repeated), end])
            repeated[self._repeats[first:last] - end] = True
        return repeated

    def _make_totals(self) -> Ints:
        return np.array([self._totals_of(shard) for shard in range(len(self.log.shards))], np.int64).ravel()

    def _totals_of(self, shard: int) -> list[int]:
        of = self.log.shards[shard]
        key = self.folder, of.name
        if key not in _TOTALS:  # a token log that grows is opened again and again
            _TOTALS[key] = self._count(shard)
        return _TOTALS[key]

    def _count(self, shard: int) -> list[int]:
        index, lengths, out = self.index(shard), self.log.shards[shard].lengths(), self._held_out(shard)
        dropped = (out, self._repeated(shard) & ~out)
        sums = [int(of) for rows in dropped for of in (np.count_nonzero(rows), lengths[rows].sum())]
        return [index.n_blocks, *index.counts.sum(axis=0).tolist(), *sums]


def pack_index_folder(log: TokenLog) -> Path:
    """Next to the token logs' own folder, which holds token logs and nothing else."""
    return Storage.of_log(log.path).pack_indexes


def cached_array(path: Path, make: Callable[[], Ints]) -> Ints:
    """The flat array that `make` returns; kept in `path` with a checksum, and memory-mapped from there.

    Storage that refuses writing, such as a folder shared read-only, costs only the time to make it again.
    """
    kept = _read(path)
    if kept is not None:
        return kept
    made = np.ascontiguousarray(make(), "<i8")
    try:
        with replacing(path) as temporary:
            np.concatenate([_checksum(made), made]).tofile(temporary)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return made


def _read(path: Path) -> Ints | None:
    """None if there is no such file or its content is not what was written."""
    try:
        flat = np.asarray(np.memmap(path, "<i8", mode="r"))
    except (FileNotFoundError, ValueError):  # ValueError: a file cut short, not whole numbers
        return None
    return flat[1:] if np.array_equal(flat[:1], _checksum(flat[1:])) else None


def _checksum(flat: Ints) -> Ints:
    return np.array([xxhash.xxh3_64_intdigest(flat.data)], np.uint64).view(np.int64)
