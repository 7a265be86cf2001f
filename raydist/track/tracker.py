"""Send a run's records to a tracking service while it trains.

    metrics.jsonl ──Tail──> a thread each ──send──> Mlflow | TensorBoard | Wandb

A slow or absent service delays neither the training nor another service. The next driver sends what a
killed one had not sent: each sink knows the first record that it lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Protocol

from raydist.folder import RunFolder
from raydist.redact import redact
from raydist.track.records import Record, Tail

LONGEST_DELAY_SECONDS = 60.0

Warn = Callable[[str], None]


class Sink(Protocol):
    """A tracking service that takes the records of one run."""

    @property
    def offset(self) -> int:
        """The byte in the run's metrics.jsonl from which on it lacks the records."""

    def send(self, records: list[Record], offset: int) -> None:
        """Take records and set the offset to `offset`. After a failed call they are sent again."""

    def close(self, state: str) -> None:
        """state: how the run ended: finished, failed or stopped."""


class Tracker:
    """Follows a run in a thread of its own until `finish`; the constructor returns at once.

    make: creates the sink.  on_warning: called once, with the first error.  Both are called from that
    thread. Records that could not be sent are sent again until the run ends.
    """

    def __init__(
        self, make: Callable[[], Sink], name: str, run: RunFolder, on_warning: Warn, poll_seconds: float = 2.0
    ) -> None:
        self._make, self.name, self._run = make, name, run
        self._on_warning, self._warned = on_warning, False
        self._poll_seconds, self._state = poll_seconds, ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def finish(self, state: str, timeout_seconds: float = 60.0) -> None:
        """Send the remaining records and how the run ended. Waits for at most `timeout_seconds`."""
        self._state = state
        self._ending.set()
        self._thread.join(timeout_seconds)
        with self._warnings():
            if self._thread.is_alive():
                raise TimeoutError(f"no answer within {timeout_seconds:g} s")

    def _work(self) -> None:
        delay = self._poll_seconds
        while not self._ending.wait(delay):
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            with self._warnings():
                self._send()
                delay = self._poll_seconds
        with self._warnings():
            self._send()
            self._sink.close(self._state)

    def _send(self) -> None:
        tail = Tail(self._run.metrics_file, self._sink.offset)
        if records := tail.poll():
            self._sink.send(records, tail.offset)

    @cached_property
    def _sink(self) -> Sink:
        """Created in the thread; after a failure the next access tries again."""
        return self._make()

    def _warnings(self) -> AbstractContextManager[None]:
        return warned(self.name, self._run, self._warn)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)


@contextmanager
def warned(name: str, folder: RunFolder, on_warning: Warn) -> Iterator[None]:
    """Turn any exception in the block into a warning, so that the run goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        on_warning(f"{name}: {redact(reason)[:500]}; {folder.path} has everything")
