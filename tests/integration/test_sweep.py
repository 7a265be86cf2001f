"""Sweeps: trials that fail, a sweep that is killed, and the job that comes out of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist import files
from raydist.cli import main
from raydist.folder import RunFolder
from raydist.track.records import effective
from tests.chaos.processes import Submission
from tests.trackers import read_wandb
from tests.whole_run import finish, write_corpus

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sweep")
    write_corpus(folder / "text.jsonl")
    return {
        "name": "lr",
        "storage": str(folder),
        "model": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {"sources": {"words": {"path": str(folder / "text.jsonl")}}, "holdout": 0.1},
        "packing": {"block_size": 64},
        "train": {
            "max_tokens": 20480,
            "global_batch_tokens": 1024,
            "micro_batch_size": 8,
            "warmup_ratio": 0,
            "mixed_precision": "fp32",
        },
        "checkpoint": {"save_steps": 5},
        "eval": {"eval_steps": 10, "max_tokens": 2000},
        "tune": {
            "search": {"packing.block_size": {"grid": [64, 512, 128]}},  # the model has 256 positions
            "scheduler": "none",
        },
    }


def written(job: dict[str, Any]) -> str:
    path = Path(job["storage"]) / f"{job['name']}.yaml"
    files.write_text(path, yaml.safe_dump(job))
    return str(path)


def tune(job: dict[str, Any], *arguments: str) -> int:
    """The exit status of `raydist tune` in this process."""
    try:
        main(["tune", written(job), *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def trial(job: dict[str, Any], number: int) -> RunFolder:
    return RunFolder(Path(job["storage"]) / f"{job['name']}-{number:03d}")


def test_trials_share_tokens_and_text_and_a_failed_one_is_recorded(
    job: dict[str, Any], ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tune(job | {"tracking": {"wandb": True}}) == 7
    output = "".join(capfd.readouterr())
    assert "1 of 3 trials failed" in output and "lr-001: block_size 512 is above" in output
    states = [trial(job, n).status()["state"] for n in range(3)]
    assert states == ["finished", "failed", "finished"]
    assert len(list(Path(job["storage"], "tokens").iterdir())) == 1  # one tokenization for both block sizes
    last = [effective(trial(job, n)) for n in (0, 2)]
    evals = [[r for r in records if r["kind"] == "eval"][-1] for records in last]
    assert evals[0]["n_bytes"] == evals[1]["n_bytes"] and evals[0]["n_tokens"] == evals[1]["n_tokens"]
    assert {trial(job, n).data()["packing"][0]["block_size"] for n in (0, 2)} == {64, 128}
    _look_at_mlflow(job)
    about = read_wandb(trial(job, 0).path)[2]
    assert (about.display_name, about.run_group, about.project) == ("lr-000", "lr", "raydist")
    sweep = Path(job["storage"], "lr")
    assert "<svg" in (sweep / "sweep.html").read_text() and "lr-001" in (sweep / "sweep.html").read_text()
    best = yaml.safe_load((sweep / "best.yaml").read_text())
    winner = min((0, 2), key=lambda n: evals[n // 2]["bits_per_byte"])
    assert best["packing"]["block_size"] == (64, None, 128)[winner] and best["tune"] is None
    assert f"raydist submit {sweep / 'best.yaml'}" in output
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(sweep / "best.yaml")])
    assert ended.value.code in (0, None), capfd.readouterr()


def _look_at_mlflow(job: dict[str, Any]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{Path(job['storage']).resolve()}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run for run in runs if run.info.run_name == "lr"]
    nested = {
        run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert nested == {"lr-000", "lr-002"}
    assert parent.data.metrics["bits_per_byte"] > 0 and parent.info.status == "FAILED"


@pytest.mark.slow
def test_a_killed_sweep_runs_no_finished_trial_twice(
    job: dict[str, Any], ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    search = {"train.lr": {"loguniform": [1e-4, 1e-2]}}
    job = {
        **job,
        "name": "killed",
        "tune": {"search": search, "trials": 2, "scheduler": "none", "concurrency": 1},
    }
    command = [sys.executable, "-m", "raydist", "tune", written(job), "--set", "storage=."]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=job["storage"],
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    deadline = time.monotonic() + 240
    while not trial(job, 1).metrics_file.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    begun = files.read_jsonl(Path(job["storage"], "killed", "trials.jsonl"))
    assert tune(job) == 0, "".join(capfd.readouterr())
    attempts = [{r["attempt"] for r in files.read_jsonl(trial(job, n).metrics_file)} for n in range(2)]
    assert attempts[0] == {1} and len(attempts[1]) <= 2
    after = files.read_jsonl(Path(job["storage"], "killed", "trials.jsonl"))
    assert after[: len(begun)] == begun and [r["number"] for r in after if "parameters" in r] == [0, 1]
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(Path(job["storage"], "killed", "best.yaml"))])
    assert ended.value.code in (0, None) and RunFolder(Path(job["storage"], "killed-best")).model.exists()


@pytest.mark.slow
def test_a_killed_trial_goes_on_where_another_ray_runs_on_the_machine(
    job: dict[str, Any], ray_local: None, tmp_path: Path
) -> None:
    """Ray Train's own actor then does not free the CPUs of the trial's workers."""
    search = {"train.lr": {"grid": [1e-3]}}
    job = {**job, "name": "lost", "storage": str(tmp_path), "tune": {"search": search, "scheduler": "none"}}
    sweep = Submission([sys.executable, "-m", "raydist", "tune", written(job)], tmp_path / "log")
    sweep.start()
    try:
        deadline = time.monotonic() + 240
        while not trial(job, 0).committed_steps():
            assert time.monotonic() < deadline and not sweep.ended
            time.sleep(0.05)
        assert sweep.kill("trial")
        assert sweep.wait(240) == 0, sweep.log.read_text()
    finally:
        sweep.kill_everything()
    attempts = {r["attempt"] for r in files.read_jsonl(trial(job, 0).metrics_file)}
    assert len(attempts) == 2 and trial(job, 0).status()["state"] == "finished"


@pytest.mark.slow
def test_a_trial_stopped_by_itself_is_told_as_such(
    job: dict[str, Any], ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    job = {**job, "name": "stopped", "train": {**job["train"], "max_tokens": 2e6}}

    def stop() -> None:
        while not trial(job, 0).metrics_file.exists():
            time.sleep(0.05)
        with contextlib.suppress(SystemExit):
            main(["stop", str(trial(job, 0).path)])

    search = {"train.lr": {"grid": [1e-3]}}
    job = {**job, "tune": {"search": search, "scheduler": "none"}}
    threading.Thread(target=stop, daemon=True).start()
    assert tune(job) == 0
    states = [r.get("state") for r in files.read_jsonl(Path(job["storage"], "stopped", "trials.jsonl"))]
    assert states == [None, "stopped"] and trial(job, 0).status()["state"] == "stopped"
    changed = {**job, "tune": {**job["tune"], "search": {"train.lr": {"grid": [1e-2]}}}}
    assert tune(changed) == 6 and "tune.search" in "".join(capfd.readouterr())
    assert not Path(job["storage"], "stopped", "best.yaml").exists()


def test_what_cannot_be_a_sweep_is_refused(
    job: dict[str, Any], ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tune({**job, "name": "none", "tune": None}) == 2
    assert "no tune section" in "".join(capfd.readouterr())
    with pytest.raises(SystemExit) as ended:
        main(["submit", written({**job, "name": "other"})])
    assert ended.value.code == 2 and "raydist tune" in "".join(capfd.readouterr())
    assert tune({**job, "name": "blind", "corpus": {**job["corpus"], "holdout": 0}}) == 2
    assert "without held-out text" in "".join(capfd.readouterr())
    assert tune({**job, "name": "large", "scaling": {"num_workers": 9}}) == 8
    told = "".join(capfd.readouterr())
    assert "no room for one trial: 9 workers of 1 CPUs, and it holds 3" in told
