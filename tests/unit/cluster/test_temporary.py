"""The folder of an embedded Ray is removed at its end, and those of killed drivers at the next start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raydist.cluster.temporary import ray_folder

HOLD = "import time\nfrom raydist.cluster.temporary import ray_folder\n\
with ray_folder() as folder:\n print(folder, flush=True)\n time.sleep(60)"
SLEEP = "import time; print(flush=True); time.sleep(60)"


def started(*command: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        return process, process.stdout.readline().strip()


def test_what_a_killed_driver_left_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "ray-of-somebody").mkdir()
    driver, left = started(HOLD)
    agent, _ = started(SLEEP, f"--session-dir={left}/session_1")
    other, _ = started(SLEEP, f"--session-dir={left}-2/session_1")
    with ray_folder() as folder:
        assert Path(left).exists() and folder.parent == tmp_path and agent.poll() is None
    assert not folder.exists() and Path(left).exists()  # its driver lives
    driver.kill()
    driver.wait()
    with ray_folder():
        assert not Path(left).exists()
        assert agent.poll() is not None and other.poll() is None
    other.kill()
    other.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["ray-of-somebody"]
