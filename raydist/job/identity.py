"""Which parts of a job make it the same run, and what differs between two jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raydist.job.schema import Job
from raydist.redact import redacted

NOT_IDENTITY = {
    "corpus.on_error",
    "model.attn_implementation",
    "train.compile",
    "train.hooks",
    "train.logging_steps",
    "train.micro_batch_size",
}
IDENTITY = ("seed", "model", "corpus", "packing", "train", "stages", "adapter", "quantization")


def identity(job: Job) -> dict[str, Any]:
    """{dotted key: value} of every key that decides the trained weights, up to rounding; without secrets."""
    values = job.model_dump(mode="json", include=set(IDENTITY))
    values["train"]["optimizer"] |= job.train.optimizer.options  # null is the value that it stands for
    left_out = set(NOT_IDENTITY)
    if any(source.weight is not None for source in job.corpus.sources.values()):
        # else it decides the weights
        left_out |= {f"corpus.sources.{name}.replay" for name in job.corpus.sources}
    return {key: redacted(value) for key, value in dotted_items(values) if key not in left_out}


def differences(old: Job, new: Job) -> list[str]:
    """`key: old -> new` for each part of the identity that differs."""
    before, after = identity(old), identity(new)
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def dotted_items(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted key, value), in order; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
