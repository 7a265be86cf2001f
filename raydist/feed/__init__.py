"""Token logs to batches: which tokens are in the g-th sample of a run, at any world size, without Ray.

    TokenLog ─▶ selection ─▶ packing ─▶ shuffle ─▶ mixture ─▶ stage ─▶ Feed ─▶ loader ─▶ Step
    (corpus)    documents    blocks of  windows    which      blocks   g-th     batches of
        │       to train on  a shard    of shards  source     in order sample   rank r of w
        │                                                                └▶ audit
        └─▶ eval_set: held-out documents, lowest hashes first ─▶ batches

    selection   the documents that training leaves out: held out, or with a text that occurred before
    packing     documents into blocks: the index of a shard's blocks, and a block as arrays
    pack_index  the blocks of a token log, under one packing and one selection
    shuffle     the order of a stream of shards: windows, and a permutation of the blocks in each
    mixture     the source of each sample, where sources have weights
    stage       blocks of one size and one mixture, in order; a later one begins with what the one before left
    feed        all stages of a run: the g-th sample
    loader      a rank's part of each global batch as tensors, read ahead by a thread
    eval_set    held-out documents as batches
    trace       from a sample back to its documents and their files
    audit       what became of every token of the token logs
    cache       arrays kept on disk next to the token logs

Everything up to `Feed` is a pure function of (token logs, mixture, packing, stages, seed, g), so the
position in the data is the integer g. torch is imported by the loader alone.

Words: a document is a run of tokens of one shard. A block is the content of one sample: pieces of documents
and padding. A sample has a number g in the run and a position in its stream; a stream is the shards of one
weighted source, or of all sources merged.
"""

from raydist.feed.audit import Audit, audit
from raydist.feed.eval_set import EvalSet
from raydist.feed.feed import Feed, make_feed
from raydist.feed.pack_index import FeedSource
from raydist.feed.stage import Counts

__all__ = ["Audit", "Counts", "EvalSet", "Feed", "FeedSource", "audit", "make_feed"]
