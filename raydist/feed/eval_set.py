"""Evaluation on documents that training never sees: held out by hash, lowest hashes first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from raydist.corpus.log import Ints, TokenLog, held_out
from raydist.feed.cache import cached_array, pack_index_folder, verified
from raydist.feed.packing import pack
from raydist.feed.stage import blocks_for
from raydist.job.schema import Packing

if TYPE_CHECKING:
    from raydist.feed.loader import Tensors


class EvalSet:
    """Whole documents of one token log, up to max_tokens of them and at least one, concatenated into blocks.

    holdout: share of the documents to choose from, those that a Feed with the same share leaves out; None for
    a token log that is for evaluation only: all of them.  unique: each text once. The choice is made once and
    kept on disk.
    shards: those that hold the documents.
    bos: the id that each document begins with; None for none.
    n_tokens: document tokens.  n_labels: predicted tokens, EOS among them.  n_bytes: of the documents' text.
    """

    def __init__(
        self,
        name: str,
        log: TokenLog,
        packing: Packing,
        *,
        holdout: float | None,
        max_tokens: float,
        unique: bool = False,
        bos: int | None = None,
    ) -> None:
        self.name = name
        self.blocks = blocks_for([log], packing, bos)
        selection = xxhash.xxh3_64_hexdigest(f"1/{holdout}/{max_tokens}{'/unique' * unique}".encode())
        chosen = cached_array(
            pack_index_folder(log) / f"{log.fingerprint}-eval" / f"{selection}.pack",
            lambda: _choose(log, 1.0 if holdout is None else holdout, max_tokens, unique).ravel(),
        ).reshape(-1, 4)
        self.n_documents = len(chosen)
        self.n_tokens, self.n_bytes = chosen[:, 2:].sum(axis=0).tolist()
        self.index = pack(
            chosen[:, 2],
            np.ones(len(chosen), bool),
            block_size=packing.block_size,
            strategy="concat",
            eos=packing.add_eos_token,
            bos=bos is not None,
        )
        self.n_blocks, self.n_labels = self.index.n_blocks, int(self.index.counts[:, 3].sum())
        self.shards = [log.shards[number] for number in np.unique(chosen[:, 0]).tolist()]
        self._tokens = _read_documents(log, chosen[:, :2])

    def batches(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[Tensors]:
        """This rank's blocks as tensors, like a Feed's samples; as many batches on every rank."""
        from raydist.feed.loader import micro_batches, rank_samples  # torch is needed only here

        samples = rank_samples(0, self.n_blocks, rank, world_size)
        for start in range(0, len(samples), micro_batch_size):
            blocks = samples[start : start + micro_batch_size]
            batch = self.blocks.empty(blocks)
            for row in np.flatnonzero(blocks >= 0).tolist():
                self.blocks.fill(batch, row, self._tokens, self.index, int(blocks[row]))
            yield from micro_batches(batch, micro_batch_size)


def _choose(log: TokenLog, share: float, max_tokens: float, unique: bool) -> Ints:
    """`lowest_hashes`, from shards whose bytes were verified. Raises LogError."""
    chosen = lowest_hashes(log, share, max_tokens, unique)
    for number in np.unique(chosen[:, 0]).tolist():
        verified(log.shards[number])
    return chosen


def lowest_hashes(log: TokenLog, share: float, max_tokens: float, unique: bool = False) -> Ints:
    """Shard, row, tokens and bytes of each chosen document, int64 [N, 4], by hash, equal ones in order.

    unique: only the first of documents with the same hash. Reads the hash, length and size columns, and holds
    no more candidates than max_tokens asks for.
    """
    chosen, hashes = np.zeros((0, 4), np.int64), np.zeros(0, np.uint64)
    for number, shard in enumerate(log.shards):
        shard_hashes = shard.hashes()
        rows = np.flatnonzero(held_out(shard_hashes, share))
        columns = [np.full(len(rows), number), rows, shard.lengths()[rows], shard.byte_counts()[rows]]
        hashes = np.concatenate([hashes, shard_hashes[rows]])
        order = np.argsort(hashes, kind="stable")
        chosen, hashes = np.concatenate([chosen, np.stack(columns, axis=1)])[order], hashes[order]
        if unique and len(hashes):
            first = np.append(True, hashes[1:] != hashes[:-1])
            chosen, hashes = chosen[first], hashes[first]
        fitting = max(1, int(np.searchsorted(np.cumsum(chosen[:, 2]), max_tokens, side="right")))
        chosen, hashes = chosen[:fitting], hashes[:fitting]
    return chosen


def first_held_out(logs: Iterable[TokenLog], holdout: float) -> NDArray[np.integer] | None:
    """Tokens of the first token log's held-out document with the lowest hash; None if no log has any."""
    for log in logs:
        chosen = lowest_hashes(log, holdout, max_tokens=0)
        if len(chosen):
            return _read_documents(log, chosen[:, :2])
    return None


def _read_documents(log: TokenLog, places: Ints) -> NDArray[np.integer]:
    """Tokens of the documents at places (shard, row), int64 [N, 2], one after another."""
    documents: list[NDArray[np.integer]] = [np.zeros(0, log.dtype)] * len(places)
    for number in np.unique(places[:, 0]).tolist():
        tokens, offsets = log.shards[number].tokens(), log.shards[number].offsets()
        for nth in np.flatnonzero(places[:, 0] == number).tolist():
            row = places[nth, 1]
            documents[nth] = tokens[offsets[row] : offsets[row + 1]]
    return np.concatenate([np.zeros(0, log.dtype), *documents])
