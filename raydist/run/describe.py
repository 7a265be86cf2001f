"""A run's data in figures, as the report and `raydist prepare` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydist.corpus.log import TokenLog
from raydist.feed.selection import unique_share
from raydist.run.dataset import Prepared

if TYPE_CHECKING:
    from raydist.feed.feed import Feed
    from raydist.feed.stage import Stage


def describe(prepared: Prepared, feed: Feed) -> dict[str, Any]:
    """sources by name; unique_share of the documents; packing, one for each block size."""
    return {
        "sources": {
            source.name: {
                **describe_log(prepared.logs[source.name]),
                "held_out_documents": source.held_out_documents,
                "held_out_tokens": source.held_out_tokens,
                "duplicate_documents": source.duplicate_documents,
                "weight": source.weight,
            }
            for source in feed.sources
        },
        "unique_share": unique_share(list(prepared.logs.values())),
        "packing": [
            _describe_packing(stage) for stage in (feed.stages if feed.stretches else feed.stages[-1:])
        ],
    }


def describe_log(log: TokenLog) -> dict[str, Any]:
    return {
        "log": log.fingerprint,
        "path": str(log.path),
        "n_documents": log.n_documents,
        "n_tokens": log.n_tokens,
        "n_bytes": log.n_bytes,
        "mean_tokens": log.n_tokens / max(1, log.n_documents),
        "n_shards": len(log.shards),
        "n_quarantined": log.n_quarantined,
        "n_empty": log.n_empty,
    }


def _describe_packing(stage: Stage) -> dict[str, Any]:
    size, blocks = stage.packing.block_size, sum(source.n_blocks for source in stage.sources)
    padding = sum(int(source.totals.padding.sum()) for source in stage.sources)
    return {
        "block_size": size,
        "strategy": stage.packing.strategy,
        "n_blocks": blocks,
        "padding_share": padding / (blocks * size),
    }
