"""The run's folder: the names in it, its status, and the lock that keeps it to one writer.

Whatever reads a run reads this folder and nothing else. What counts as done is a file written last.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raydist import files
from raydist.errors import RunBusy, RunError

LIVE = ("planning", "preparing", "training")
STATES = (*LIVE, "finished", "failed", "stopped")


class RunFolder:
    """Paths and records of one run; making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_file = path / "job.yaml"
        self.status_file = path / "status.json"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.ledger_file = path / "ledger.jsonl"
        self.checkpoints = path / "checkpoints"
        self.ray = path / "ray"
        self.model = path / "model"
        self.report = path / "report.html"
        self.stop_flag = path / "stop"

    def status(self) -> dict[str, Any]:
        """{} for a run that was never started."""
        return files.read_record(self.status_file)

    def state(self) -> str:
        """One of STATES; `interrupted` where a driver is said to be at work and is dead."""
        said = str(self.status().get("state", "planning"))
        return "interrupted" if said in LIVE and not self.driver() else said

    def driver(self) -> str:
        """The process that holds the run, as "process 12 on host"; empty while none does."""
        lease = self.path / ".lease"
        return lease.read_text() if lease.exists() and _is_held(lease) else ""

    def set_status(self, state: str, **more: Any) -> None:
        assert state in STATES, state
        since = datetime.now(UTC).isoformat(timespec="seconds")
        files.write_json(self.status_file, {"state": state, "since": since, **more})

    def data(self) -> dict[str, Any]:
        """What is known of the run's tokens, and the fingerprints of the logs it is pinned to."""
        return files.read_record(self.data_file)

    def add_data(self, **more: Any) -> None:
        files.write_json(self.data_file, {**self.data(), **more})

    def committed(self) -> bool:
        return bool(self.committed_steps())

    def committed_steps(self) -> list[int]:
        """Of the checkpoints that are whole, in order."""
        found = self.checkpoints.glob("step-*/COMMIT.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def next_attempt(self) -> int:
        """Attempts count from 1 over the whole life of the run."""
        taken = [int(p.name.removeprefix("attempt-")) for p in self.ray.glob("attempt-*")]
        return max(taken, default=0) + 1

    def lease(self) -> AbstractContextManager[None]:
        """Hold the run for this driver. Raises RunBusy, naming the holder, while another one lives."""
        return exclusive(self.path / ".lease", wait_seconds=1)  # while somebody looks at `driver`

    def writer(self) -> AbstractContextManager[None]:
        """Hold the run's records for this attempt's rank 0.

        A driver can die before its workers do: the next attempt waits here until the last writer is
        gone, so that two attempts never write checkpoints or records side by side. One on a host that
        is cut off from the network is gone when its collective times out, 300 s after the cut.
        """
        return exclusive(self.path / ".writer", wait_seconds=280)


@contextmanager
def exclusive(path: Path, wait_seconds: float) -> Iterator[None]:
    """Lock `path` for this process. The kernel frees it the moment the process is dead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        deadline = time.monotonic() + wait_seconds
        while not _locked(lock.fileno()):
            if time.monotonic() >= deadline:
                raise _busy(path)
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _locked(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    with path.open() as lock:
        return not _locked(lock.fileno(), fcntl.LOCK_SH)


def _busy(path: Path) -> RunBusy:
    return RunBusy(
        f"another process is writing the run {path.parent.name}",
        where=f"{path.parent}, held by {path.read_text() or 'a process that just started'}",
        why="two writers would mix their checkpoints",
        fix=f"wait for it, or stop it: raydist stop {path.parent}",
    )


def runs_in(storage: str) -> list[RunFolder]:
    """By name."""
    return [RunFolder(path.parent) for path in sorted(Path(storage).expanduser().glob("*/job.yaml"))]


def find_run(run: str | Path, storage: str = "runs") -> RunFolder:
    """The folder of RUN, given as a folder or as a name within `storage`."""
    for path in (Path(run), Path(storage) / run):
        if (path / "job.yaml").exists():
            return RunFolder(path)
    known = [folder.path.name for folder in runs_in(storage)]
    raise RunError(
        f"no run {run}",
        where=f"neither {run} nor {Path(storage) / run} holds a job.yaml",
        fix=f"runs in {storage}: {', '.join(known) or 'none'}; or name another folder with --storage",
    )
