"""The plan of an attempt, from the nodes that there are and what earlier attempts found."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydist.errors import OutOfMemory
from raydist.folder import RunFolder
from raydist.job.plan import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS, make_plan
from raydist.run.attempts import (
    halved,
    plan_attempt,
    remembered,
    starting_tokens,
    threads_of,
    workers_of_last,
)
from raydist.run.estimate import micro_batch_from
from tests.train_parts import make_job


def test_a_plan_is_made_of_the_nodes_that_are_there_when_the_attempt_begins(tmp_path: Path) -> None:
    train = {"micro_batch_size": "auto", "global_batch_size": 100_000}
    job = make_job(tmp_path, train=train, scaling={"num_workers": 2})
    on_cpus = [{"CPU": 8.0}]
    on_gpus = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    size = job.packing.block_size
    for nodes, tokens in ((on_cpus, CPU_MICRO_BATCH_TOKENS), (on_gpus, GPU_MICRO_BATCH_TOKENS)):
        assert starting_tokens(job, nodes) == tokens
        plan = plan_attempt(job, None, nodes, None)
        assert (plan.world_size, plan.micro_batch_size) == (2, tokens // size)
    halved = plan_attempt(job, None, on_gpus, GPU_MICRO_BATCH_TOKENS // 2)
    assert halved.micro_batch_size == GPU_MICRO_BATCH_TOKENS // 2 // size
    assert (halved.steps, halved.samples) == (plan.steps, plan.samples)


def test_a_run_keeps_the_threads_that_it_began_with(tmp_path: Path) -> None:
    """Else a resumed run on CPU would not end in the same bits."""
    folder, job = RunFolder(tmp_path / "run"), make_job(tmp_path)
    assert [threads_of(job, folder, cpus) for cpus in (3, 1, 8)] == [3, 3, 3]
    two = make_job(tmp_path, scaling={"num_workers": 2})
    assert threads_of(two, folder, 1) == 1  # another world size is another order of sums in any case
    asked = make_job(tmp_path, scaling={"num_workers": 2, "cpus_per_worker": 4})
    assert threads_of(asked, folder, 4) == 4 and threads_of(two, folder, 1) == 4


def test_a_plan_says_where_its_micro_batches_come_from(tmp_path: Path) -> None:
    auto = {"train": {"micro_batch_size": "auto"}}
    job = make_job(tmp_path, **auto)
    assert micro_batch_from(job, 64) == "earlier attempts" and micro_batch_from(job, None) == "first guess"
    assert micro_batch_from(make_job(tmp_path), 64) == "job"
    for other in ({"strategy": {"name": "zero", "stage": 1}}, {"scaling": {"use_gpu": False}}):
        assert "halved" in micro_batch_from(make_job(tmp_path, **auto, **other), None)


def began(folder: RunFolder, workers: int, tokens: int | None = None, device: str = "cuda") -> None:
    found = {} if tokens is None else {"micro_batch_tokens": tokens}
    folder.append_metric({"kind": "start", "attempt": 1, "device": device, "world_size": workers, **found})


def test_micro_batches_are_remembered_for_each_number_of_workers(tmp_path: Path) -> None:
    folder, job = RunFolder(tmp_path / "run"), make_job(tmp_path)
    folder.path.mkdir()
    assert remembered(job, folder, "cuda", 8) is None and workers_of_last(folder) is None
    began(folder, 8, 4096)
    assert remembered(job, folder, "cuda", 2) == 4096, "what others found is better than nothing"
    began(folder, 2, 16384)
    assert [remembered(job, folder, "cuda", n) for n in (8, 2, 4)] == [4096, 16384, 16384]
    assert remembered(job, folder, "cpu", 8) is None and workers_of_last(folder) == 2


@pytest.mark.parametrize(("strategy", "of_eight"), [("ddp", 2048), ("fsdp", 4096)])
def test_a_halved_micro_batch_holds_where_a_worker_has_no_more_room(
    tmp_path: Path, strategy: str, of_eight: int
) -> None:
    """Under fsdp each of eight workers has a quarter of what each of two has of the model."""
    sections = {"strategy": {"name": strategy}, "packing": {"block_size": 512}}
    auto = {"micro_batch_size": "auto", "global_batch_size": 64}
    job = make_job(tmp_path, train=auto, **sections)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    began(folder, 8, 4096)
    began(folder, 2)
    plan = make_plan(job, 2, None, 4096)
    assert halved(job, folder, plan, 1, OutOfMemory("out of memory")) == 2048
    assert [remembered(job, folder, "cuda", n) for n in (1, 2, 8)] == [2048, 2048, of_eight]
    folder.add_data(micro_batch_tokens=1024)  # as a run of an older version kept it
    assert remembered(job, folder, "cuda", 8) == 1024
