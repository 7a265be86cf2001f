"""When a run with fewer workers than its most is asked to go on with more."""

from __future__ import annotations

from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydist.errors import JobError
from raydist.files import read_json
from raydist.folder import RunFolder
from raydist.job.plan import sized
from raydist.job.schema import Job
from raydist.parallel.world import World
from raydist.run.elastic import LOOK_SECONDS, RESTARTS, Growth
from raydist.run.torchrun import _Lead
from raydist.training.attempt_spec import AttemptSpec
from tests.train_parts import make_job, make_spec

STARTED = {"start": 3.0, "imports": 2.0, "load": 5.0, "prepare": 1000.0}
RESTART_SECONDS = 10.0


class Watched:
    """A run of one worker of at most four, at its tenth of 1,000 steps of a second each."""

    def __init__(self, folder: Path, *, left: int = 990, **scaling: Any) -> None:
        self.job: Job = make_job(folder, scaling={"num_workers": [1, 4], **scaling})
        spec = make_spec(folder)
        self.spec: AttemptSpec = replace(spec, job=sized(self.job, 1))
        plan = replace(spec.plan.stages[0], samples=1000 * spec.plan.global_batch_size)
        self.spec = replace(self.spec, plan=replace(spec.plan, stages=(plan,)))
        self.folder, self.said, self.now, self.room = RunFolder(self.spec.run), list[str](), 0.0, 1
        self.folder.attempt(1).mkdir(parents=True)
        self.growth = Growth(
            self.job,
            self.folder,
            self.spec,
            self.said.append,
            count=lambda: self.room,
            clock=lambda: self.now,
        )
        self.growth.record({"kind": "start", "seconds": STARTED})
        self.growth.record({"kind": "train", "step": 1000 - left, "step_seconds": 1.0})

    def looks(self, seconds: float, count: int = 1) -> bool:
        """That many looks after so many seconds. Whether the attempt was asked to end since its start."""
        self.now += seconds
        for _ in range(count):
            self.growth.look()
            wait(self.growth.looking)
            self.growth.look()
            self.now += LOOK_SECONDS
        return self.flag.exists()

    @property
    def flag(self) -> Path:
        return self.folder.resize_flag(1)


def test_room_that_is_there_for_a_while_lets_a_run_grow(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.room = 3
    assert not run.looks(RESTARTS * RESTART_SECONDS)
    assert run.looks(0) and read_json(run.flag) == {"workers": 3}
    assert run.said == ["there is room for 3 workers: going on with them after a checkpoint"]
    run.flag.unlink()
    assert not run.looks(1000, count=3), "an attempt is asked once"


def test_a_run_does_not_grow_before_its_start_was_worth_it(tmp_path: Path) -> None:
    """Preparing the data is no part of a start that comes again."""
    run = Watched(tmp_path)
    run.room = 4
    assert not run.looks(RESTARTS * RESTART_SECONDS - 50, count=9)
    assert run.looks(5, count=2)
    asked = Watched(tmp_path / "asked", grow_after=7)
    asked.room = 4
    assert not asked.looks(0) and not asked.looks(0) and asked.looks(0, count=2)


def test_room_that_goes_away_is_none(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    for room in (2, 1, 2, 1):
        run.room = room
        assert not run.looks(1000)
    run.room = 4
    assert not run.looks(0)
    run.room = 2
    assert run.looks(0) and read_json(run.flag) == {"workers": 2}, "what was there at both looks"


@pytest.mark.parametrize(("left", "worth"), [(13, False), (14, True)])
def test_a_run_near_its_end_stays_as_it_is(tmp_path: Path, left: int, worth: bool) -> None:
    """With four workers in place of one, 13 steps of a second save 9.75 s, and a start takes 10."""
    run = Watched(tmp_path, left=left)
    run.room = 4
    assert run.looks(RESTARTS * RESTART_SECONDS, count=3) == worth


def test_a_fixed_number_of_workers_never_grows(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, scaling={"num_workers": 1})
    growth = Growth(spec.job, RunFolder(spec.run), spec, print, count=lambda: pytest.fail("it looked"))
    growth.record({"kind": "start", "seconds": {}})
    growth.look()
    assert not growth.looking and sized(spec.job, 5) is spec.job


def test_the_job_of_an_attempt_is_one_of_a_fixed_number(tmp_path: Path) -> None:
    job = sized(make_job(tmp_path, scaling={"num_workers": [1, 4], "grow_after": 7}), 3)
    assert (job.scaling.num_workers, job.scaling.elastic) == (3, False)
    assert Job.model_validate(job.model_dump(mode="json")) == job, "rules hold for it as well"


@pytest.mark.parametrize("size", [1, 5])
def test_torchrun_starts_as_many_ranks_as_the_range_allows(tmp_path: Path, size: int) -> None:
    job = make_job(tmp_path, scaling={"num_workers": [2, 4]})
    with pytest.raises(JobError, match=f"{size} ranks were started, and the job takes 2 to 4 workers"):
        _Lead(job, World(0, size), None)._check_size()
    _Lead(job, World(0, 3), None)._check_size()
    _Lead(make_job(tmp_path, scaling={"num_workers": 2}), World(0, size), None)._check_size()
