"""Who may take a run's or a sweep's folder, and what its status says afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raydist import files
from raydist.errors import JobError, RunChanged, Stopped
from raydist.folder import Kind, RunFolder
from raydist.job.schema import Job
from raydist.run import lifecycle
from raydist.run.lifecycle import Life
from raydist.sealed import append_sealed
from raydist.track.listener import Listener


class Messages(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def a_job(storage: Path, lr: float = 1e-4, **more: Any) -> Job:
    values = {
        "name": "r",
        "storage": str(storage),
        "model": {"base": "b"},
        "corpus": {"sources": {"a": {"path": "a.txt"}}},
        "train": {"max_tokens": 8, "lr": lr},
    }
    return Job.model_validate(values | more)


def a_sweep(storage: Path, seed: int = 0) -> Job:
    return a_job(storage, seed=seed, tune={"search": {"train.lr": {"grid": [1e-4]}}})


def begin(job: Job, kind: Kind, work: Any = lambda life: None) -> RunFolder:
    life = Life(job, kind, Messages())
    with life.held(), life.begun():
        work(life)
    return life.folder


def committed(folder: RunFolder) -> None:
    files.write_text(folder.checkpoint(2) / "COMMIT.json", "{}")


def begun(folder: RunFolder) -> None:
    append_sealed(folder.trials_file, {"number": 0, "parameters": {}})


def test_why_a_run_is_submitted_again_is_known(tmp_path: Path) -> None:
    def fail(life: Life) -> None:
        assert life.why == "first submission"
        raise JobError("no file matches", fix="correct the path")

    with pytest.raises(JobError):
        begin(a_job(tmp_path), "run", fail)
    again: list[str] = []

    def stop(life: Life) -> None:
        again.append(life.why)
        raise life.stopped()

    with pytest.raises(Stopped):
        begin(a_job(tmp_path), "run", stop)
    folder = begin(a_job(tmp_path), "run", lambda life: again.append(life.why))
    folder.set_status("training")  # as a killed driver leaves it
    begin(a_job(tmp_path), "run", lambda life: again.append(life.why))
    begin(a_job(tmp_path, lr=1e-3), "run", lambda life: again.append(life.why))
    assert again == [
        "submitted again after it failed: no file matches",
        "submitted again after it was stopped",
        "submitted again after its driver was killed",
        "first submission",
    ]


def test_a_run_that_began_before_threads_were_kept_goes_on_with_those_of_its_job(tmp_path: Path) -> None:
    folder = begin(
        a_job(tmp_path, scaling={"cpus_per_worker": 3}), "run", lambda life: committed(life.folder)
    )
    assert folder.threads(1) is None
    files.write_text(folder.attempt(1) / "ray_wrote_this", "")
    begin(a_job(tmp_path), "run")
    assert folder.threads(1) == 3 and folder.threads(2) is None


@pytest.mark.parametrize(
    ("kind", "one", "other", "bind", "why"),
    [
        ("run", a_job, lambda at: a_job(at, lr=2e-4), committed, "its checkpoints were trained"),
        ("sweep", a_sweep, lambda at: a_sweep(at, seed=1), begun, "its trials would not be comparable"),
    ],
)
def test_a_changed_job_replaces_what_is_not_trained_yet_and_is_refused_afterwards(
    tmp_path: Path, kind: Kind, one: Any, other: Any, bind: Any, why: str
) -> None:
    folder = begin(one(tmp_path), kind, lambda life: life.folder.add_data(collator="of the old job"))
    assert folder.data()
    begin(other(tmp_path), kind)
    assert not folder.data()
    bind(folder)
    before = folder.job_file.read_bytes()
    with pytest.raises(RunChanged, match=r"(?s)the job differs from .*->") as refused:
        begin(one(tmp_path), kind)
    assert why in refused.value.why and folder.job_file.read_bytes() == before
    assert folder.state() == "finished"
    begin(other(tmp_path), kind)


def test_what_a_sweep_searches_may_not_change_once_trials_have_begun(tmp_path: Path) -> None:
    begun(begin(a_sweep(tmp_path), "sweep"))
    wider = a_job(tmp_path, tune={"search": {"train.lr": {"grid": [1e-4, 1e-3]}}})
    with pytest.raises(RunChanged, match=r"tune\.search"):
        begin(wider, "sweep")
    more = a_job(tmp_path, tune={"search": {"train.lr": {"grid": [1e-4]}}, "concurrency": 1})
    begin(more, "sweep")  # how they are run may


def test_the_status_says_how_it_ended(tmp_path: Path) -> None:
    job = a_job(tmp_path)

    def fail(life: Life) -> None:
        assert life.folder.status()["state"] == "planning"
        raise JobError("no such thing", where="here")

    with pytest.raises(JobError):
        begin(job, "run", fail)
    folder = RunFolder(tmp_path / "r")
    status = folder.status()
    assert (status["state"], status["kind"]) == ("failed", "JobError") and "no such thing" in status["error"]

    def stop(life: Life) -> None:
        life.folder.stop_flag.touch()
        life.stop_if_asked()

    with pytest.raises(Stopped):
        begin(job, "run", stop)
    assert folder.state() == "stopped"
    begin(job, "run")
    assert folder.state() == "finished" and not folder.stop_flag.exists()


def test_the_resolved_job_is_read_once_and_a_finished_run_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(a_job(tmp_path), "run")
    read: list[Any] = []
    load = lifecycle.load_job
    monkeypatch.setattr(lifecycle, "load_job", lambda path: read.append(path) or load(path))
    life = Life(a_job(tmp_path), "run", Messages())
    with life.held():
        assert life.finished
        with life.begun():
            assert not life.finished
    changed = Life(a_job(tmp_path, lr=2e-4), "run", Messages())
    with changed.held():
        assert not changed.finished
    assert len(read) == 2


def test_signals_ask_for_a_stop_after_a_checkpoint_and_end_at_once_before_training(tmp_path: Path) -> None:
    def interrupted(life: Life) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        begin(a_job(tmp_path), "run", interrupted)

    messages: list[str] = []

    def train(life: Life) -> None:
        life.training()
        os.kill(os.getpid(), signal.SIGTERM)
        messages.extend(life.listener.texts)  # type: ignore[attr-defined]
        assert life.folder.stop_flag.exists()
        os.kill(os.getpid(), signal.SIGINT)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        begin(a_job(tmp_path), "run", train)
    assert messages == ["stopping after a checkpoint; once more to stop at once"]
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert RunFolder(tmp_path / "r").status()["kind"] == "KeyboardInterrupt"
