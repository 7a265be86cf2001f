"""A forked rank ends as a process of its own would: its status, its errors, its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.fork_server import Rank
from tests.train_parts import losses, make_spec, start_ranks


def test_what_a_rank_raises_is_its_exit_status_and_its_errors(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path / f"{number}.json", os.environ) for number in range(2)]
    for number, rank in enumerate(ranks):
        errors = rank.communicate(timeout=60)[1].decode()
        assert rank.returncode == rank.poll() == 1
        assert f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/{number}.json'" in errors


def test_a_killed_rank_is_dead_and_the_other_says_so(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, world_size=2, train={"max_steps": 100_000})
    one, two = start_ranks(spec)
    while 3 not in losses(spec.run):
        time.sleep(0.05)
    assert one.poll() is None and psutil.Process(one.pid).parent() == psutil.Process(two.pid).parent()
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    two.kill()
    assert two.wait(10) == -signal.SIGKILL
    assert b"Error" in one.communicate(60)[1] and one.returncode == 1
    assert not psutil.pid_exists(one.pid) and not psutil.pid_exists(two.pid)
