"""A token log under one packing and one selection: the blocks of each shard, indexed once and kept.

    <storage>/.packs/<log>-<packing>/counts          a row per shard; with it, a feed opens without any index
                                     <shard>.pack    the shard's PackIndex

Both are made again when they are missing or damaged, see raydist.feed.cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import xxhash

from raydist.corpus.log import Ints, TokenLog
from raydist.feed.cache import cached_array, pack_index_folder, verified
from raydist.feed.packing import REVISION, PackIndex, pack
from raydist.feed.selection import Selection
from raydist.job.schema import Packing

_TOTALS: dict[tuple[Path, str], list[int]] = {}
"""Totals of the shards that this process has counted, by folder and shard name."""


class Totals(NamedTuple):
    """Sums of each shard, int64 [S]. tokens: document tokens, without EOS."""

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
    """The blocks of a source. To open it reads one small file, or, the first time, packs every shard.

    n_blocks hold n_tokens (without EOS) and n_eos. The selection leaves out held_out_documents with
    held_out_tokens and, of the others, duplicate_documents with duplicate_tokens. on_packed: called after
    each shard that is packed.  bos: whether each document begins with an added BOS.
    """

    def __init__(
        self,
        source: FeedSource,
        packing: Packing,
        selection: Selection,
        on_packed: Callable[[], None] = lambda: None,
        *,
        bos: bool = False,
    ) -> None:
        self.name, self.log, self.weight = source.name, source.log, source.weight
        self.packing, self.selection, self.bos = packing, selection, bos
        # The folder's name stands for all that decides which inputs are in which block.
        parts = packing.model_dump(include={"block_size", "strategy", "add_eos_token"})
        parts |= {"bos": True} if bos else {}  # left out where not used: older indexes have no such part
        identity = orjson.dumps([REVISION, parts, *selection.identity], option=orjson.OPT_SORT_KEYS)
        name = f"{self.log.fingerprint}-{xxhash.xxh3_64_hexdigest(identity)}"
        self.folder = pack_index_folder(self.log) / name
        # The totals of a token log that grows are not kept: there will be more of them.
        complete = self.log.complete

        def make() -> Ints:
            return self._make_totals(on_packed)

        rows = cached_array(self.folder / "counts", make) if complete else make()
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
        lengths = verified(self.log.shards[shard]).lengths()
        keep = ~(self.selection.held_out(shard) | self.selection.repeated(shard))
        size, strategy, eos = self.packing.block_size, self.packing.strategy, self.packing.add_eos_token
        return pack(lengths, keep, block_size=size, strategy=strategy, eos=eos, bos=self.bos)

    def _make_totals(self, on_packed: Callable[[], None]) -> Ints:
        rows = []
        for shard in range(len(self.log.shards)):
            rows.append(self._totals_of(shard))
            on_packed()
        return np.array(rows, np.int64).ravel()

    def _totals_of(self, shard: int) -> list[int]:
        key = self.folder, self.log.shards[shard].name
        if key not in _TOTALS:  # a token log that grows is opened again and again
            index, lengths = self.index(shard), verified(self.log.shards[shard]).lengths()
            held_out = self.selection.held_out(shard)
            duplicate = self.selection.repeated(shard) & ~held_out
            left_out = [int(n) for rows in (held_out, duplicate) for n in (rows.sum(), lengths[rows].sum())]
            _TOTALS[key] = [index.n_blocks, *index.counts.sum(axis=0).tolist(), *left_out]
        return _TOTALS[key]
