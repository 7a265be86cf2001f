"""The job of one trial of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydist.job.schema import Job
from raydist.job.values import with_parameters


def trial_name(job: Job, trial: int | str) -> str:
    return f"{job.name}-{trial:03d}" if isinstance(trial, int) else f"{job.name}-{trial}"


def trial_at(job: Job, end: int) -> Job:
    """A trial with the first (0) or the last (-1) value of every searched key."""
    assert job.tune is not None
    return trial_job(job, 0, {key: of.extremes[end] for key, of in job.tune.search.items()})


def trial_job(job: Job, trial: int | str, parameters: Mapping[str, Any]) -> Job:
    """The job of one trial. All trials are evaluated with the smallest searched block size as context."""
    blocks = job.tune.search.get("packing.block_size") if job.tune else None
    context = job.eval.block_size or (min(map(int, blocks.extremes)) if blocks else None)
    shared = {"name": trial_name(job, trial), "eval.block_size": context, "checkpoint.save_total_limit": 1}
    return Job.model_validate(with_parameters(job.model_dump(mode="json"), {**shared, **parameters}))
