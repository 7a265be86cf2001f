"""An attempt on Ray Train: the same losses as without Ray, and what it says when it ends badly."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group

from raydist.cluster.groups import Wishes
from raydist.cluster.resources import free_resources
from raydist.cluster.trainer import run_attempt
from raydist.errors import CheckpointError, WorkerLost
from raydist.files import read_json
from raydist.folder import RunFolder
from raydist.run.elastic import Workers
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import newest_valid
from raydist.training.loop import train
from tests.train_parts import losses, make_job, make_spec, run_ranks
from tests.weights import weight_hash

pytestmark = pytest.mark.usefixtures("ray_local")


def when(spec: AttemptSpec, step: int, act: Callable[[], None]) -> threading.Thread:
    """Call `act` once that step is recorded."""

    def watch() -> None:
        while step not in losses(spec.run):
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def workers() -> list[psutil.Process]:
    """The training workers of this process's Ray."""
    return [
        p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline()[:1])
    ]


@pytest.mark.slow
def test_a_killed_worker_is_a_loss_and_the_next_attempt_ends_bit_identical(tmp_path: Path) -> None:
    whole = make_spec(tmp_path, world_size=2, run="whole")
    run_ranks(whole)  # without Ray
    cut = replace(whole, run=tmp_path / "cut")
    killer = when(cut, 7, lambda: os.kill(workers()[1].pid, signal.SIGKILL))
    with pytest.raises(WorkerLost):
        run_attempt(cut)
    killer.join()
    found = newest_valid(RunFolder(cut.run))
    assert found is not None and found.step < 20
    result = run_attempt(replace(cut, attempt=2))
    assert (result.stopped, result.step) == (False, 20)
    assert weight_hash(cut.run / "model") == weight_hash(whole.run / "model")
    assert losses(cut.run) == losses(whole.run)
    pointers = [read_json(path) for path in cut.run.glob("ray/attempt-2/checkpoint_*/pointer.json")]
    assert max(pointer["step"] for pointer in pointers) == 20


@pytest.mark.slow
def test_an_exception_arrives_with_its_type(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 5})
    train(spec)
    other_data = make_spec(tmp_path, train={"max_steps": 5}, attempt=2, seed=8)
    with pytest.raises(CheckpointError, match="other data"):
        run_attempt(other_data)


@pytest.mark.slow
def test_what_the_run_itself_holds_counts_as_free(tmp_path: Path) -> None:
    """Groups of its workers, and those that stand for workers that it wishes to have."""

    def free(*ours: str) -> float:
        (node,) = free_resources(ours)
        return node["free CPU"]

    def wait_for(cpus: float) -> None:
        while free() != cpus:  # Ray tells it a moment later
            time.sleep(0.05)

    wishes, before = Wishes(), free()
    wishes.make(5, {"CPU": 1.0})  # of a Ray of three CPUs
    held = wishes.ids
    wait_for(0)
    assert len(held) == 5 and free(*held) == before == 3
    wishes.withdraw()
    wait_for(before)
    assert free(*held) == before and not wishes.ids


@pytest.mark.slow
def test_an_attempt_takes_what_others_leave_and_fewer_where_ray_finds_no_room(tmp_path: Path) -> None:
    """On a Ray of three CPUs, of which a job with explicit CPUs per worker may take all."""
    scaling = {"num_workers": [1, 3], "cpus_per_worker": 1}
    workers = Workers(make_job(tmp_path, scaling=scaling), RunFolder(tmp_path / "run"))

    def of_next() -> int:
        job, _ = workers.of_next_attempt()
        assert job.scaling.least == job.scaling.most
        return job.scaling.most

    assert of_next() == 3
    others = placement_group([{"CPU": 1}, {"CPU": 1}])
    ray.get(others.ready())
    assert of_next() == 1
    ray.util.remove_placement_group(others)
    assert of_next() == 3
    assert workers.take_fewer(3) and of_next() == 2 and of_next() == 3, "once"
    assert workers.take_fewer(2) and not workers.take_fewer(1)
    fixed = make_job(tmp_path, scaling={"num_workers": 9})
    assert Workers(fixed, RunFolder(tmp_path / "run")).of_next_attempt()[0] is fixed
