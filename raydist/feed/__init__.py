"""Token logs to batches: which tokens are in the g-th sample of a run, at any world size, without Ray.

    TokenLog ─lengths─▶ packing ─blocks of each shard─▶ order ─▶ mixture ─▶ Feed ─▶ loader ─▶ Step
    (corpus)            packs: kept beside the logs     windows, which      block(g)  rank r of w,
        │                                               Feistel  source     audit     thread, tensors
        └─lowest hashes─▶ holdout ─▶ EvalSet

Everything up to `Feed` is a pure function of (logs, mixture, packing, seed, g), so the position in the
data is the integer g. torch is imported by the loader alone.
"""

from raydist.feed.audit import Audit, audit
from raydist.feed.eval_set import EvalSet
from raydist.feed.feed import Feed, make_feed
from raydist.feed.pack_index import FeedSource
from raydist.feed.stage import Counts

__all__ = ["Audit", "Counts", "EvalSet", "Feed", "FeedSource", "audit", "make_feed"]
