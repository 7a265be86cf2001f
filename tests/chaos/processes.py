"""A command as a process of its own, with all that it starts: found, killed, frozen, started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

TAG = "RAYDIST_RUN_TAG"
"""In the environment of the driver and so of all that it starts: Ray's processes can outlive it."""

NAMES = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "trial": "ray::ResourceTrainable",
    "reader": "ray::Read",  # Ray Data's
    "raylet": "raylet",
    "gcs": "gcs_server",
}
"""The processes of a run that can be named, and what their names begin with."""


class Submission:
    """log: a file that the output is added to, over all starts."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.tag = uuid.uuid4().hex
        self._offset = 0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._offset = self.log.stat().st_size if self.log.exists() else 0
        of_this_process = ("RAY_ADDRESS", "RAY_TMPDIR")
        environment = {key: value for key, value in os.environ.items() if key not in of_this_process}
        with self.log.open("ab") as output:
            self.driver = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "PYTHONUNBUFFERED": "1", TAG: self.tag},
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status; None if the driver lives on after so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.driver.wait(seconds)
        return None

    @property
    def ended(self) -> bool:
        return self.driver.poll() is not None

    @property
    def output(self) -> str:
        """What was printed since the last start."""
        with self.log.open("rb") as log:
            log.seek(self._offset)
            return log.read().decode("utf-8", "replace")

    def processes(self) -> list[psutil.Process]:
        """All with the tag and their descendants: a process that renames itself loses its environment."""
        tagged = [process for process in psutil.process_iter() if _tag_of(process) == self.tag]
        return list({*tagged, *(child for process in tagged for child in _descendants(process))})

    def named(self, name: str) -> list[psutil.Process]:
        """Those of one of NAMES."""
        return [each for each in self.processes() if _title(each).startswith(NAMES[name])]

    def kill(self, name: str) -> bool:
        """SIGKILL to one process of NAMES, or to the driver. False if there was none."""
        if name == "driver":
            self.driver.kill()
            self.driver.wait()
            return True
        return any(_send(process, signal.SIGKILL) for process in self.named(name)[:1])

    def kill_everything(self) -> None:
        """Stopped first, so that none can start another unseen."""
        for number in (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL):
            processes = self.processes()
            for process in processes:
                _send(process, number)
        self.driver.wait()
        psutil.wait_procs(processes, timeout=30)

    def freeze(self, seconds: float) -> None:
        """SIGSTOP to all and SIGCONT so much later, as when a laptop sleeps."""
        processes = self.processes()
        for process in processes:
            _send(process, signal.SIGSTOP)
        time.sleep(seconds)
        for process in processes:
            _send(process, signal.SIGCONT)

    def stop_one(self, name: str) -> bool:
        """SIGSTOP to one process of NAMES, for good."""
        return any(_send(process, signal.SIGSTOP) for process in self.named(name)[:1])


def _title(process: psutil.Process) -> str:
    """Ray names its worker processes by what they run; the kernel knows its own programs by their files."""
    try:
        return (process.cmdline() or [""])[0] if process.name().startswith("ray::") else process.name()
    except psutil.Error:
        return ""


def _tag_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(TAG)
    except psutil.Error:
        return None


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def submitted(job: dict[str, Any], folder: Path) -> Submission:
    """`raydist submit` of the job, begun, with its file and its log in the folder."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    submission = Submission([sys.executable, "-m", "raydist", "submit", str(file)], folder / "log")
    submission.start()
    return submission
