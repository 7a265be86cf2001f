"""What counts as running out of memory, and when there is nothing smaller to try."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from raydist.errors import OutOfMemory
from raydist.files import append_json
from raydist.folder import RunFolder
from raydist.job.plan import Plan
from raydist.job.schema import Job
from raydist.run.attempts import halved, plan_attempt
from raydist.training.memory import memory_watched, out_of_memory
from tests.train_parts import make_job


def test_a_failed_allocation_is_told_apart_from_other_errors() -> None:
    told = r"(?s)micro batches of 8, then 4 sequences.*can't allocate memory.*auto finds one"
    with pytest.raises(OutOfMemory, match=told), memory_watched("8, then 4"):
        torch.empty(2**50)
    with pytest.raises(OutOfMemory), memory_watched("8, then 4"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), memory_watched("8, then 4"):
        raise RuntimeError("shapes differ")


def test_it_is_halved_down_to_one_and_not_where_the_job_says_how_many(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    error = out_of_memory("here", MemoryError())
    auto = {"micro_batch_size": "auto"}
    of_auto = make_job(tmp_path, train=auto)
    with pytest.raises(OutOfMemory, match="here"):  # the attempt did not begin: the model does not fit
        halved(of_auto, folder, plan_attempt(of_auto, None, [], None), 1, error)
    append_json(folder.metrics_file, {"kind": "start", "step": 0, "attempt": 1})

    def found(job: Job) -> list[str]:
        plans: list[Plan] = [plan_attempt(job, None, [], None)]
        with contextlib.suppress(OutOfMemory):
            for _ in range(9):
                tokens = halved(job, folder, plans[-1], 1, error)
                plans.append(plan_attempt(job, None, [], tokens))
        assert len(plans) < 9
        assert len({(plan.samples, plan.global_batch_size) for plan in plans}) == 1
        return [plan.micro_batches for plan in plans]

    assert found(make_job(tmp_path, train=auto)) == ["4", "2", "1"]
    assert folder.data()["micro_batch_tokens"] == 32
    assert found(make_job(tmp_path, train={"micro_batch_size": 4})) == ["4"]
    stages = [{"block_size": 16, "max_tokens": 100}, {"block_size": 64, "max_tokens": 100}]
    curriculum = make_job(tmp_path, train={**auto, "max_steps": None}, stages=stages)
    assert found(curriculum) == ["4, then 4", "4, then 2", "4, then 1", "2, then 1", "1, then 1"]
