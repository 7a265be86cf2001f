"""`torchrun -m raydist.training`: the same run without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist import files
from raydist.api import prepare, train
from raydist.folder import RunFolder
from raydist.job.load import load_job
from raydist.track.records import effective
from tests.integration.test_run import CONFIG, write_corpus
from tests.weights import weight_hash


def training(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def torchrun(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).with_name("torchrun")
    return training(
        launcher, "--standalone", "--nproc-per-node", "2", "-m", "raydist.training", job, *arguments
    )


def alone(job: Path) -> subprocess.CompletedProcess[str]:
    return training(sys.executable, "-m", "raydist.training", job)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    write_corpus(folder / "text.jsonl")
    values: dict[str, Any] = {
        "name": "alone",
        "storage": str(folder / "runs"),
        "model": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {"sources": {"words": {"path": str(folder / "text.jsonl")}}, "holdout": 0.05},
        "packing": {"block_size": 128},
        "train": {"max_steps": 8, "global_batch_size": 8, "mixed_precision": "fp32", "logging_steps": 1},
        "scaling": {"num_workers": 2},
        "checkpoint": {"save_steps": 4},
        "eval": {"eval_steps": 8, "max_tokens": 2000},
        "tracking": {"mlflow": False},
    }
    path = folder / "job.yaml"
    files.write_text(path, yaml.safe_dump(values))
    return path


def test_what_is_not_prepared_is_refused(job: Path) -> None:
    done = alone(job)
    assert done.returncode == 4 and done.stderr.startswith("raydist: ")
    assert "raydist prepare makes it and the token logs" in done.stderr


def test_two_ranks_without_ray_end_as_two_workers_of_ray(job: Path, ray_local: None) -> None:
    prepare(load_job(job))
    storage = Path(load_job(job).storage)
    done = torchrun(job, "--profile", str(job.parent / "profile"))
    assert done.returncode == 0, done.stderr
    folder = RunFolder(storage / "alone")
    assert folder.status()["state"] == "finished" and folder.report.exists()
    assert folder.data()["audit"]["n_samples"] == 64 and folder.data()["sample"]["prompt"]
    assert "step 8/8" in done.stderr and "eval  step 8" in done.stderr
    assert sorted(p.name for p in (job.parent / "profile").iterdir()) == [
        "rank-0.trace.json",
        "rank-1.trace.json",
    ]
    under_ray = train(load_job(job, ["name=ray"]))
    assert weight_hash(folder.model) == weight_hash(under_ray.model_path)
    assert losses(folder) == losses(RunFolder(under_ray.folder))
    again = alone(job)
    assert again.returncode == 0 and "finished already; nothing to do" in again.stderr


def losses(folder: RunFolder) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in effective(folder) if r["kind"] == "train"}
