"""The temporary folder of an embedded Ray: gone after a clean end, removed at the next start after a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

PREFIX = "ray-"
OWNER = "raydist.lock"
"""Held by the driver: the kernel frees it the moment the driver is dead."""
END_SECONDS = 10.0


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A new folder for a Ray of this process's own. What dead drivers left of theirs is removed first.

    At the end it is removed, once the processes of that Ray are gone.
    """
    remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    unnamed = folder / f".{OWNER}"
    with unnamed.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(folder / OWNER)  # nobody ever sees it unlocked while this process lives
        try:
            yield folder
        finally:
            _remove(folder)


def remove_abandoned(place: Path) -> None:
    """Remove this user's folders in `place` whose drivers are dead, and end what is left of their Rays."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # not ours to read, or another start removes it right now
            if folder.stat().st_uid == os.getuid():
                with (folder / OWNER).open("r+") as lock:
                    if _is_free(lock):
                        _remove(folder)


def _is_free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + END_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        psutil.wait_procs(_killed(folder), timeout=1)
        shutil.rmtree(folder, ignore_errors=True)  # fails while a process still writes there


def _killed(folder: Path) -> list[psutil.Process]:
    """Ray's processes name their session's folder in their arguments, and its workers end with its raylet."""
    found = []
    for process in psutil.process_iter(["uids", "cmdline"]):
        ours = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if ours and any(f"{folder}/" in argument for argument in process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.kill()
                found.append(process)
    return found
