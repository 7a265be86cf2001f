"""`torchrun -m raydist.training`: the same run without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from raydist import files
from raydist.folder import RunFolder
from tests.weights import weight_hash
from tests.whole_run import STEPS, folder_of, losses


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


def written(job: dict[str, Any], folder: Path) -> Path:
    path = folder / "job.yaml"
    files.write_text(path, yaml.safe_dump(job))
    return path


def test_what_is_not_prepared_is_refused(whole: dict[str, Any], tmp_path: Path) -> None:
    done = alone(written({**whole, "storage": str(tmp_path)}, tmp_path))
    assert done.returncode == 4 and "\nraydist: " in done.stderr
    assert "raydist prepare makes it and the token logs" in done.stderr


def test_two_ranks_without_ray_end_as_two_workers_of_ray(
    whole: dict[str, Any], undisturbed: tuple[RunFolder, str], tmp_path: Path
) -> None:
    under_ray = undisturbed[0]
    job = {**whole, "name": "torchrun"}
    path = written(job, tmp_path)
    done = torchrun(path, "--profile", str(tmp_path / "profile"))
    assert done.returncode == 0, done.stderr
    folder = folder_of(job)
    assert folder.status()["state"] == "finished" and folder.report.exists()
    assert folder.data()["audit"] == under_ray.data()["audit"] and folder.data()["sample"]["prompt"]
    assert f"step {STEPS}/{STEPS}" in done.stderr and f"eval  step {STEPS}" in done.stderr
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "rank-0.trace.json",
        "rank-1.trace.json",
    ]
    assert weight_hash(folder.model) == weight_hash(under_ray.model)
    assert losses(folder) == losses(under_ray) and len(losses(folder)) == STEPS
    again = alone(path)
    assert again.returncode == 0 and "finished already; nothing to do" in again.stderr
