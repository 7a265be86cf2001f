"""What a sweep may search: the job of a trial, and the keys that would make trials incomparable."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from raydist.job.schema import Job

SHARED = {
    "name": "the sweep names its trials",
    "storage": "all trials share it",
    "cluster": "all trials share it",
    "tracking": "all trials share it",
    "scaling": "how many trials fit on the cluster is worked out from it once",
    "tune": "a sweep cannot search itself",
    "corpus": "trials are compared on the same held-out text",
    "eval": "trials are compared by the same evaluation",
    "model.tokenizer": "trials share one tokenization",
    "model.base": "trials share one tokenizer and one tokenization",
}
BATCH = ("packing.block_size", "train.global_batch_size", "train.global_batch_tokens")


def refusal(key: str, job: Job) -> str:
    """Why `key` cannot be searched; empty if it can be."""
    for shared, reason in SHARED.items():
        if key == shared or key.startswith(f"{shared}."):
            return f"cannot be searched: {reason}"
    if key == "packing.block_size" and job.stages:
        return "has no effect beside stages, which have block sizes of their own"
    if key in BATCH and job.train.max_steps is not None:
        return "trials of equal steps would see unequal text; give train.max_tokens instead of max_steps"
    return ""


def put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys; sections are made on the way."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def with_parameters(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of one run: those at dotted keys replaced, and no sweep."""
    changed = copy.deepcopy({**values, "tune": None})
    for dotted, value in parameters.items():
        put(changed, dotted.split("."), value)
    return changed


def trial_name(job: Job, trial: int | str) -> str:
    return f"{job.name}-{trial:03d}" if isinstance(trial, int) else f"{job.name}-{trial}"


def trial_job(job: Job, trial: int | str, parameters: Mapping[str, Any]) -> Job:
    """One trial's run. Every block size is evaluated with the least of them as context."""
    blocks = job.tune.search.get("packing.block_size") if job.tune else None
    context = job.eval.block_size or (min(map(int, blocks.extremes)) if blocks else None)
    shared = {"name": trial_name(job, trial), "eval.block_size": context, "checkpoint.save_total_limit": 1}
    return Job.model_validate(with_parameters(job.model_dump(mode="json"), {**shared, **parameters}))
