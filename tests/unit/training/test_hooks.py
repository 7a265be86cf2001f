"""Hooks are called at every moment of an attempt, a user's own too; a checkpoint may be written late."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import raydist
from raydist.errors import JobError
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.parallel.ddp import DdpOnCpu
from raydist.parallel.strategy import SaveHandle
from raydist.track.records import figures
from raydist.training import checkpoint
from raydist.training.checkpoint import Commit
from raydist.training.commit_request import ask_for_commit
from raydist.training.hooks import Hook, StepResult, load_hooks
from raydist.training.loop import Attempt, train
from tests.train_parts import losses, make_spec, run_ranks
from tests.weights import weight_hash

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Diary(Hook):
    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_start(self, attempt: Attempt) -> None:
        self.entries.append(("start", attempt.step))

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self.entries.append(("step", attempt.step, attempt.samples, result.loss is not None))

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        self.entries.append(("evaluate", attempt.step, *evals))

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        self.entries.append(("commit", commit.step))

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        self.entries.append(("end", attempt.step, stopped))


def test_a_hook_is_called_at_every_moment_in_order(tmp_path: Path) -> None:
    diary = Diary()
    spec = make_spec(
        tmp_path,
        train={"max_steps": 4, "logging_steps": 2},
        eval={"eval_steps": 3},
        checkpoint={"save_steps": 2, "asynchronous": False},
    )
    train(spec, hooks=[diary])
    assert diary.entries == [
        ("start", 0),
        ("evaluate", 0, "random"),
        ("step", 1, 4, True),
        ("step", 2, 8, True),
        ("commit", 2),
        ("step", 3, 12, False),
        ("evaluate", 3, "random"),
        ("step", 4, 16, True),
        ("evaluate", 4, "random"),
        ("commit", 4),
        ("end", 4, False),
    ]


def test_the_documented_alert_says_so_and_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strict.py").write_text(
        "from loss_alert import LossAlert\n\nclass Strict(LossAlert):\n"
        "    def __init__(self):\n        super().__init__(threshold=1.0, patience=2)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(EXAMPLES), *sys.path])
    spec = make_spec(tmp_path, train={"hooks": ["strict:Strict"]})
    result = train(spec)
    assert (result.stopped, result.step) == (True, 3)  # asked after step 2, it ends after the next one
    records = read_jsonl(RunFolder(spec.run).metrics_file)
    assert [r["above_threshold"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    said = [r["what"] for r in records if r["kind"] == "incident"]
    assert said == [f"the loss is {loss:.3f}, above 1" for loss in losses(spec.run).values()]
    assert RunFolder(spec.run).committed_steps() == [3]


def test_what_is_no_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import raydist\n\ndef function(): pass\n\nclass Needy(raydist.Hook):\n"
        "    def __init__(self, threshold): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path, said in {
        "theirs:function": "theirs:function is not a hook",
        "theirs:Absent": "cannot import theirs:Absent",
        "theirs:Needy": "theirs:Needy cannot be made without arguments",
    }.items():
        with pytest.raises(JobError, match=said) as refused:
            load_hooks([path])
        assert refused.value.where == "train.hooks[0]"
    assert raydist.Hook is Hook


def test_a_profile_holds_the_work_of_a_few_steps(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, run="profiled", train={"max_steps": 8})
    train(replace(spec, profile=tmp_path / "profile"))
    trace = json.loads((tmp_path / "profile" / "rank-0.trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert [name for name in names if name.startswith("ProfilerStep")] == [
        f"ProfilerStep#{n}" for n in (3, 4, 5)
    ]
    assert any("aten::mm" in name for name in names)
    short = make_spec(tmp_path, run="short", train={"max_steps": 3})
    train(replace(short, profile=tmp_path / "none"))
    records = read_jsonl(RunFolder(short.run).metrics_file)
    assert [r["what"] for r in records if r["kind"] == "incident"] == [
        "no profile: it takes 6 steps, there were 3"
    ]


def test_a_checkpoint_is_made_after_the_step_that_follows_a_request(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 9}, checkpoint={"save_steps": 100, "save_total_limit": 9})

    class Asks(Hook):
        def on_step(self, attempt: Attempt, result: StepResult) -> None:
            if attempt.step in (2, 6):
                ask_for_commit(attempt.folder, spec.attempt)

    train(spec, hooks=[Asks()])
    assert RunFolder(spec.run).committed_steps() == [4, 8, 9]


class Late:
    """A handle that is done at the third look, or once it is waited for."""

    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        self.files, self.looks, self.waited = files, 0, False

    def done(self, within: float = 0.0) -> bool:
        self.looks, self.waited = self.looks + 1, self.waited or within > 0
        return self.looks >= 3 or self.waited


def test_a_checkpoint_that_is_written_late_is_committed_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on meanwhile; the commit is of the step that was saved, and a resume is exact."""
    whole = make_spec(tmp_path, run="whole")
    train(whole)
    handles: list[Late] = []

    class Slow(DdpOnCpu):
        def save(self, folder: Path, *, behind: bool) -> SaveHandle:
            handles.append(Late(super().save(folder, behind=False).files))
            return handles[-1]

    monkeypatch.setattr("raydist.parallel.ddp.DdpOnCpu", Slow)
    diary = Diary()
    spec = make_spec(tmp_path, run="late")
    train(spec, hooks=[diary])
    commits = [entry for entry in diary.entries if entry[0] in ("step", "commit")]
    assert commits.index(("commit", 5)) == commits.index(("step", 7, 28, True)) + 1
    assert [handle.waited for handle in handles] == [False, False, False, True]  # of the last, before the end
    assert weight_hash(RunFolder(spec.run).model) == weight_hash(RunFolder(whole.run).model)
    assert losses(spec.run) == losses(whole.run)
    newest = checkpoint.newest_valid(RunFolder(spec.run))
    assert newest is not None and (newest.step, newest.samples) == (20, 80)
    assert [line["steps"] for line in read_jsonl(spec.run / "ledger.jsonl")] == [
        [0, 5],
        [5, 10],
        [10, 15],
        [15, 20],
    ]


class Room(Hook):
    """The driver asks for an end with room for more workers, at that step; then perhaps for a stop."""

    def __init__(self, step: int, *, stop: bool = False) -> None:
        self._step, self._stop = step, stop

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == self._step:
            flag = attempt.folder.resize_flag(attempt.spec.attempt)
            flag.parent.mkdir(parents=True, exist_ok=True)
            flag.touch()
            if self._stop:
                attempt.folder.stop_flag.touch()


def test_a_run_grows_from_a_checkpoint_just_before_and_loses_no_step(tmp_path: Path) -> None:
    whole = make_spec(tmp_path, run="whole", train={"max_steps": 12})
    train(whole)
    first = replace(whole, run=tmp_path / "grown", elastic=True)
    result = train(first, hooks=[Room(6)])
    assert (result.stopped, result.resized, result.step) == (True, True, 8)
    plan = make_plan(whole.job, 2, None)
    second = replace(first, plan=plan, attempt=2, workers_before=1, why="there is room for more workers")
    run_ranks(second)
    records = read_jsonl(first.run / "metrics.jsonl")
    assert [(r["step"], r["world_size"]) for r in records if r["kind"] in ("start", "resume")] == [
        (0, 1),
        (8, 2),
    ]
    (resized,) = (r for r in records if r["kind"] == "resize")
    assert (resized["from"], resized["to"], resized["why"]) == (1, 2, second.why)
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [*range(1, 13)], "none twice"
    assert [figures(record)["workers"] for record in trained] == [1] * 8 + [2] * 4
    assert "workers" not in read_jsonl(whole.run / "metrics.jsonl")[2], "of a run that stays as it is"
    assert losses(first.run) == pytest.approx(losses(whole.run), rel=1e-5)


def test_a_stop_comes_before_a_resize_and_the_last_step_before_both(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 6})
    stopped = train(spec, hooks=[Room(2, stop=True)])
    assert (stopped.stopped, stopped.resized, stopped.step) == (True, False, 4)
    RunFolder(spec.run).stop_flag.unlink()
    ended = train(replace(spec, attempt=2), hooks=[Room(5)])
    assert (ended.stopped, ended.resized, ended.step) == (False, False, 6)
