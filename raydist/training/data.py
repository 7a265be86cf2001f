"""What an attempt reads: the training samples and the evaluation sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydist.job.schema import Job
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.evaluate import EvalData

if TYPE_CHECKING:
    from raydist.corpus.log import Shard, TokenLog
    from raydist.feed import EvalSet, Feed


@dataclass(frozen=True)
class Data:
    """feed: to train on.  eval_sets: to evaluate on; one may be empty.  eval_shards: those that hold them."""

    feed: Feed
    eval_sets: Sequence[EvalData]
    eval_shards: Sequence[Shard] = ()


def open_data(spec: AttemptSpec) -> Data:
    """Open the spec's token logs. Raises LogError for one that is not whole."""
    from raydist.corpus.log import open_log
    from raydist.feed import make_feed

    logs = {name: open_log(path, growing=spec.growing) for name, path in spec.logs.items()}
    eval_logs = {name: open_log(path) for name, path in spec.eval_logs.items()}
    eval_sets, feed = (
        open_eval_sets(spec.job, logs, eval_logs, spec.bos),
        make_feed(spec.job, logs, bos=spec.bos, mixes=spec.mixes),
    )
    return Data(feed, eval_sets, [shard for each in eval_sets for shard in each.shards])


def open_eval_sets(
    job: Job, logs: Mapping[str, TokenLog], eval_logs: Mapping[str, TokenLog], bos: int | None
) -> list[EvalSet]:
    """Of the documents that are held out, by source; and of the sources that are for evaluation only."""
    from raydist.feed import EvalSet

    limit, share, unique = job.eval.max_tokens, job.corpus.holdout, job.corpus.dedup != "none"
    packing = job.packing.model_copy(update={"block_size": job.eval_block_size})
    held_out = [
        EvalSet(name, log, packing, holdout=share, max_tokens=limit, unique=unique, bos=bos)
        for name, log in logs.items()
        if share > 0 and log.complete  # the lowest hashes are known once the whole token log is there
    ]
    extra = [
        EvalSet(name, log, packing, holdout=None, max_tokens=limit, bos=bos)
        for name, log in eval_logs.items()
    ]
    return [*held_out, *extra]
