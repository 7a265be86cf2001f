"""Benchmarks work from end to end: on toys, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raydist.files import read_json


def run(repository: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / "benchmarks" / "gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_benchmark_runs_every_side_of_a_row(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "--tiny", "--row", "8b-lora", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "found.json")
    (row,) = found["rows"]
    others = {"raydist-unmasked", "trainer", "trainer-compiled", "bare"}  # Ray's is in another row
    assert set(row["sides"]) == {"raydist", *others}
    for side, figures in row["sides"].items():
        assert "error" not in figures, (side, figures)
        assert figures["tokens_per_second"] > 0 and len(figures["step_seconds"]) == 2
        assert f"  {side}" in done.stdout
    assert set(row["ratios"]) == {f"raydist / {other}" for other in others}
    assert found["card"]["matmul_flops"] > 0 and found["versions"]["torch"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so(repository: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run(repository, "--json", tmp_path / "found.json")
    assert done.returncode == 1 and "needs a GPU; --tiny runs" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_checkpoint_benchmark_measures_every_side(repository: Path) -> None:
    command = [sys.executable, repository / "benchmarks" / "checkpoint.py", "--json", "--saves", "1"]
    small = ["--layers", "1", "--hidden", "64", "--block", "32", "--threads", "1"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["seconds"]) == {"behind", "waiting", "torch_save", "dcp_async"}
    for side in found["seconds"].values():
        assert side["stall"] > 0 and side["write"] >= side["stall"] * 0.99
    assert found["ratios"].keys() == found["aims"].keys()
