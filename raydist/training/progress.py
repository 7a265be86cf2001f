"""What rank 0 is doing, in progress.json of the run's folder, for whoever shows the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from raydist.folder import RunFolder
from raydist.training.phases import Phases

WRITE_SECONDS = 0.5


@contextlib.contextmanager
def progress_written(folder: RunFolder, attempt: int, phases: Phases) -> Iterator[None]:
    """A thread writes what changed, twice a second, until the block ends. It says nothing of a full disk."""
    ended = threading.Event()

    def write() -> None:
        last = None
        while True:
            if (now := phases.now) != last:
                with contextlib.suppress(OSError):
                    folder.write_progress(attempt, *now)
                last = now
            if ended.wait(WRITE_SECONDS):
                return

    writer = threading.Thread(target=write, name="progress", daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
