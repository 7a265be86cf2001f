"""`make chaos` works: some of its faults, each of another phase; and some kills of its saves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("real", "simulated")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_cost_what_the_simulated_clock_says(repository: Path, tmp_path: Path) -> None:
    """A short form of `make chaos-ettr`. Its aim is for a machine that does nothing else."""
    command = [sys.executable, "-m", "tests.chaos.ettr", "--faults", "2", "--interval", "1"]
    done = subprocess.run(
        [*command, "--storage", str(tmp_path)], cwd=repository, capture_output=True, text=True, check=False
    )
    real, simulated = (re.search(rf"^{part}: .* ETTR ([\d.]+)%", done.stdout, re.M) for part in PARTS)
    assert real and simulated and not list(tmp_path.iterdir()), done.stdout + done.stderr
    foreseen = re.search(r"simulated with these kills: ([\d.]+)%", done.stdout)
    assert foreseen and float(foreseen[1]) == pytest.approx(float(real[1]), abs=10), done.stdout
    assert float(simulated[1]) > 90


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["train: SIGKILL of everything", "files: status.json", "prepare: no space"])
def test_a_fault_ends_in_the_undisturbed_bytes(repository: Path, tmp_path: Path, fault: str) -> None:
    command = [sys.executable, "-m", "tests.chaos.chaos", "--only", fault, "--faults", "1"]
    done = subprocess.run(
        [*command, "--storage", str(tmp_path)], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 struck, 1 right, 0 missed" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_while_checkpoints_are_written_leave_none_that_is_wrong(
    repository: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.chaos.saves", "--kills", "12", "--variants", "2"]
    done = subprocess.run(
        [*command, "--storage", str(tmp_path)], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right: {'kills': 12, 'while writing'" in done.stdout and not list(tmp_path.iterdir())
