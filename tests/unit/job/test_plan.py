"""A job becomes steps, samples and micro batches; no world size changes the global batch."""

from __future__ import annotations

import pytest

from raydist.errors import JobError
from raydist.job.load import build_job
from raydist.job.plan import make_plan
from raydist.job.schema import Job


def job(**train: object) -> Job:
    values = {
        "name": "x",
        "model": {"base": "b"},
        "corpus": {"sources": {"a": {"path": "p"}}},
        "packing": {"block_size": 128},
        "train": {"global_batch_size": 12, **train},
    }
    return build_job(values)


def test_an_epoch_ends_with_a_short_step() -> None:
    plan = make_plan(job(epochs=2), 3, samples_per_epoch=25)
    assert (plan.samples, plan.steps, plan.tokens_per_step) == (50, 5, 1536)


def test_tokens_round_up_to_whole_steps() -> None:
    assert make_plan(job(max_tokens=1537), 1, None).steps == 2


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 6), (2, 3), (5, 2), (7, 1), (12, 1), (20, 1)])
def test_every_world_size_covers_the_batch(world_size: int, accumulation: int) -> None:
    plan = make_plan(job(max_steps=1, micro_batch_size=2), world_size, None)
    assert plan.accumulation_steps == accumulation
    assert world_size * accumulation * plan.micro_batch_size >= 12
    assert plan.samples == 12


def test_auto_is_bounded_by_the_batch() -> None:
    assert make_plan(job(max_steps=1), 1, None).micro_batch_size == 12
    assert make_plan(job(max_steps=1), 4, None).micro_batch_size == 3


def test_epochs_of_a_mixture_are_refused() -> None:
    with pytest.raises(JobError, match="without weights"):
        make_plan(job(epochs=1), 1, None)


def test_a_batch_in_tokens_is_whole_blocks() -> None:
    values = job(max_steps=3).model_dump(exclude_unset=True)
    del values["train"]["global_batch_size"]
    values["train"]["global_batch_tokens"] = 512
    assert make_plan(build_job(values), 1, None).global_batch_size == 4
    values["train"]["global_batch_tokens"] = 500
    with pytest.raises(JobError, match=r"500 is not a multiple of packing.block_size 128"):
        build_job(values)
