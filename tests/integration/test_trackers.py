"""A run mirrored into a real MLflow store, event files and offline W&B files, and read back from them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydist.errors import JobError
from raydist.folder import RunFolder
from raydist.job.load import job_yaml
from raydist.job.schema import Job
from raydist.run.run import run_job
from raydist.sweep.sweep import run_sweep
from raydist.track.mlflow import finish_parent, start_parent, tracking_uri
from raydist.track.start import start_trackers
from tests.trackers import read_tensorboard, read_wandb

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def a_job(**tracking: Any) -> Job:
    return Job.model_validate(
        {
            "name": "demo",
            "model": {"base": "some/model"},
            "corpus": {"sources": {"my web": {"path": "x"}}},
            "train": {"max_steps": 100, "lr": 1e-3},
            "tracking": tracking,
        }
    )


def append(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"attempt": 1, "time": 1e9} | record) + "\n" for record in records)


def train(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 10.0 - step, "mfu": None, "tokens_per_second": 5}


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "raydist-job.yaml").write_text(job_yaml(a_job()))
    return run


def mirror(job: Job, run: Path, state: str) -> list[str]:
    warnings: list[str] = []
    for tracker in start_trackers(job, RunFolder(run), warnings.append, poll_seconds=0.05):
        tracker.finish(state)
    return warnings


def test_a_run_and_its_resumption_are_one_mlflow_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    append(
        run,
        train(1),
        train(2),
        {"kind": "eval", "step": 2, "source": "my web", "eval_loss": 3.0, "perplexity": 20.1},
    )
    assert mirror(a_job(), run, "stopped") == []
    append(run, {"kind": "resume", "step": 2}, *(train(step) for step in range(3, 1503)))
    (run / "report.html").write_text("<p>report</p>")
    changed = a_job().model_copy(update={"scaling": a_job().scaling.model_copy(update={"num_workers": 2})})
    assert mirror(changed, run, "finished") == []
    assert capfd.readouterr() == ("", "")

    client = MlflowClient(f"sqlite:///{run.parent.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raydist")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("demo", "FINISHED")
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(step, 10.0 - step) for step in range(1, 1503)]
    assert (
        found.data.metrics["eval/my web/perplexity"] == 20.1 and found.data.metrics["eval/my web/loss"] == 3.0
    )
    assert found.data.params["train.lr"] == "0.001" and found.data.params["scaling.num_workers"] == "1"
    assert found.data.tags["resumed.scaling.num_workers"] == "2"
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"raydist-job.yaml", "report.html"}
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(
        run.parent / "mlflow-artifacts"
    )


def test_records_are_sent_while_the_run_goes_on(run: Path) -> None:
    (tracker,) = start_trackers(a_job(), RunFolder(run), pytest.fail, poll_seconds=0.05)
    append(run, train(1))
    deadline = time.monotonic() + 60
    while not (run / "mlflow.json").exists() or json.loads((run / "mlflow.json").read_text())["offset"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.finish("failed")


def test_a_server_that_does_not_answer_is_one_warning_without_secrets(run: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    append(run, train(1))
    job = a_job(mlflow=f"http://ann:hunter2@127.0.0.1:{port}")
    started = time.monotonic()
    (warning,) = mirror(job, run, "finished")
    assert f"http://***@127.0.0.1:{port}" in warning and "hunter2" not in warning
    assert time.monotonic() - started < 60


def test_the_trials_of_a_sweep_stand_under_its_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    sweep = tmp_path / "runs" / "sweep"
    trial = sweep / "trials" / "0"
    trial.mkdir(parents=True)
    uri = tracking_uri(a_job(), RunFolder(sweep))
    parent = start_parent(a_job(), RunFolder(sweep), on_warning=pytest.fail)
    assert parent and start_parent(a_job(), RunFolder(sweep), on_warning=pytest.fail) == parent
    append(trial, train(1))
    (tracker,) = start_trackers(a_job(mlflow=uri), RunFolder(trial), pytest.fail, parent=parent)
    tracker.finish("finished")
    for name in ("raydist-job.yaml", "sweep.html", "best.yaml"):
        (sweep / name).write_text(name)
    for lr in (3e-4, 5e-4):  # the second time after a resumption that found a better trial
        finish_parent(
            a_job(),
            RunFolder(sweep),
            "finished",
            {"best bits": lr},
            {"train.lr": str(lr)},
            on_warning=pytest.fail,
        )

    client = MlflowClient(uri)
    found = client.get_run(parent)
    assert found.info.status == "FINISHED" and found.data.metrics == {"best bits": 5e-4}
    assert found.data.params["train.lr"] == "0.001" and found.data.params["best.train.lr"] == "0.0003"
    assert found.data.tags["resumed.best.train.lr"] == "0.0005"
    assert {a.path for a in client.list_artifacts(parent)} == {"raydist-job.yaml", "sweep.html", "best.yaml"}
    (child,) = client.search_runs([found.info.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert child.data.metrics["loss"] == 9.0 and child.info.run_id != parent


def test_a_run_that_was_deleted_from_the_server_is_made_anew(run: Path) -> None:
    from mlflow import MlflowClient

    append(run, train(1))
    assert mirror(a_job(), run, "stopped") == []
    first = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri(a_job(), RunFolder(run)))
    client.delete_run(first)
    assert mirror(a_job(), run, "finished") == []
    second = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert second != first and client.get_run(second).data.metrics["loss"] == 9.0


def test_a_sweep_without_its_server_is_warned(run: Path) -> None:
    warnings: list[str] = []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        job = a_job(mlflow=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert start_parent(job, RunFolder(run), on_warning=warnings.append) is None
    finish_parent(job, RunFolder(run), "finished", {}, {}, on_warning=warnings.append)
    assert len(warnings) == 2


FILES = {"mlflow": False, "tensorboard": True, "wandb": "my-project"}
DRIVER = """
import sys, time
from pathlib import Path
from raydist.folder import RunFolder
from raydist.job.load import load_job
from raydist.track.start import start_trackers
run = Path(sys.argv[1])
start_trackers(load_job(run / "raydist-job.yaml"), RunFolder(run), print, poll_seconds=0.05)
time.sleep(300)
"""


def test_files_hold_the_history_across_lost_workers_and_a_killed_driver(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["raydist", "--set", "tracking.mlflow=https://ann:hunter2@host"])
    secret = {"tokenizer": "https://ann:hunter2@host/tokenizer"}
    job = a_job(**FILES)
    job = job.model_copy(update={"model": job.model.model_copy(update=secret)})
    (run / "raydist-job.yaml").write_text(job_yaml(job))
    evaluation = {"kind": "eval", "step": 3, "source": "my web", "eval_loss": 3.0, "perplexity": 20.5}
    append(run, {"kind": "start", "step": 0}, *map(train, range(1, 5)))
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        _drive_and_kill(run, proxy)
    first_id = json.loads((run / "wandb.json").read_text())["run_id"]
    # that driver's workers were lost, and steps 3 and 4 are trained again, by the next driver too
    append(run, {"kind": "resume", "step": 2}, train(3) | {"loss": -3.0})
    assert mirror(job, run, "stopped") == []
    append(run, {"kind": "resume", "step": 2}, train(3) | {"loss": -3.5}, evaluation)
    assert mirror(job, run, "finished") == []
    assert capfd.readouterr() == ("", "")

    points = read_tensorboard(run)
    assert sum(path.stat().st_size > 0 for path in (run / "tensorboard").iterdir()) == 1
    assert points["loss"] == [(1, 9.0), (2, 8.0), (3, -3.5)]
    assert points["eval/my web/perplexity"] == [(3, 20.5)] and points["eval/my web/loss"] == [(3, 3.0)]
    points, config, about = read_wandb(run, rows=6)
    assert about.run_id == first_id and about.project == "my-project"
    assert points["loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (3, -3.0), (3, -3.5)]
    assert points["eval/my web/perplexity"] == [(3, 20.5)] and points["_timestamp"][0] == (1, 1e9)
    assert config["model.tokenizer"] == "https://***@host/tokenizer" and config["train.lr"] == 1e-3
    written = [path.read_bytes() for path in (run / "wandb").rglob("*") if path.is_file()]
    assert written and not any(b"hunter2" in content for content in written)


def _drive_and_kill(run: Path, proxy: socket.socket) -> None:
    """A driver whose way to the network is `proxy`: nothing is sent there, and no process is left."""
    at = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    network = {"HTTP_PROXY": at, "HTTPS_PROXY": at, "NO_PROXY": "", "no_proxy": ""}
    own = {
        name: value for name, value in os.environ.items() if "WANDB" not in name
    }  # or it joins our service
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(run)], env={**own, **network}) as driver:
        deadline = time.monotonic() + 60
        while not all(any(run.glob(f)) for f in ("tensorboard/*", "wandb/*/run-*.wandb")):
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.2)
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    assert children
    while not all(map(_has_ended, children)):
        assert time.monotonic() < deadline + 60
        time.sleep(0.1)
    proxy.setblocking(False)
    with pytest.raises(BlockingIOError):
        proxy.accept()


def _has_ended(process: psutil.Process) -> bool:
    """Or is dead and not collected: after a test with Ray this process takes in orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(run, train(1))
    (run / "tensorboard").write_text("in the way")
    (warning,) = mirror(a_job(**FILES), run, "finished")
    assert warning.startswith("TensorBoard: FileExistsError") and read_wandb(run)[0]["loss"] == [(1, 9.0)]
    (run / "tensorboard").unlink()
    monkeypatch.setenv("WANDB_MODE", "online")
    (warning,) = mirror(a_job(**FILES), run, "finished")
    assert warning.startswith("W&B: UsageError: No API key") and read_tensorboard(run)["loss"] == [(1, 9.0)]


@pytest.mark.parametrize("sweep", [False, True])
def test_wandb_that_is_not_installed_is_told_before_anything_is_done(
    sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import raydist.model.build  # noqa: F401 - with all that is imported later

    tune = {"search": {"train.lr": {"choice": [1e-3, 1e-4]}}, "trials": 2} if sweep else None
    job = Job.model_validate(
        {**a_job(wandb=True).model_dump(mode="json"), "storage": str(tmp_path), "tune": tune}
    )
    monkeypatch.setattr(sys, "path", [])  # where nothing is installed
    with pytest.raises(JobError, match="wandb is not installed") as refused:
        (run_sweep if sweep else run_job)(job)
    assert "pip install 'raydist[wandb]'" in refused.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}
