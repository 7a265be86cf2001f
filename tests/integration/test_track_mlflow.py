"""A run mirrored into a real MLflow store, and read back from it."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from raydist.job.load import job_yaml
from raydist.job.schema import Job
from raydist.track.mlflow import MlflowTracker

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(job_yaml(a_job()))
    return run


def mirror(job: Job, run: Path, state: str) -> list[str]:
    warnings: list[str] = []
    MlflowTracker(job, run, on_warning=warnings.append, poll_seconds=0.05).finish(state)
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
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"job.yaml", "report.html"}
    assert Path(found.info.artifact_uri.removeprefix("file://")).is_relative_to(
        run.parent / "mlflow-artifacts"
    )


def test_records_are_sent_while_the_run_goes_on(run: Path) -> None:
    tracker = MlflowTracker(a_job(), run, on_warning=pytest.fail, poll_seconds=0.05)
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
