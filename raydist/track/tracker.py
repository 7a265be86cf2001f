"""Follow a run for a tracker.

    metrics.jsonl ──Tail──> a thread each ──send──> Mlflow | TensorBoard | Wandb

A slow or absent tracker holds up neither the training nor another tracker. What a killed driver had not
sent is sent by the next one: each sink knows from where on it lacks records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Protocol

from raydist.folder import RunFolder
from raydist.track.records import Record, Tail, redact

LONGEST_DELAY_SECONDS = 60.0

Warn = Callable[[str], None]


class Sink(Protocol):
    """Where records go."""

    @property
    def offset(self) -> int:
        """Where the records begin that it lacks: a byte of the run's file of records."""

    def send(self, records: list[Record], offset: int) -> None:
        """Take records; afterwards its offset is `offset`. The records of a call that failed come again."""

    def close(self, state: str) -> None:
        """`state`: how the run ended: finished, failed or stopped."""


class Tracker:
    """Follows a run from a thread of its own until `finish`; the constructor returns at once.

    make: makes the sink.  on_warning: called once, with the first thing that went wrong.  Both are called
    from that thread. What could not be sent is tried again until the run ends.
    """

    def __init__(
        self, make: Callable[[], Sink], name: str, run: RunFolder, on_warning: Warn, poll_seconds: float = 2.0
    ) -> None:
        self._make, self._name, self._run = make, name, run
        self._on_warning, self._warned = on_warning, False
        self._poll_seconds, self._state = poll_seconds, ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def finish(self, state: str, timeout_seconds: float = 60.0) -> None:
        """Send the rest, and how the run ended."""
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
        """Made in the thread, and tried again until that succeeds."""
        return self._make()

    def _warnings(self) -> AbstractContextManager[None]:
        return warned(self._name, self._run, self._warn)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)


@contextmanager
def warned(name: str, folder: RunFolder, on_warning: Warn) -> Iterator[None]:
    """Whatever goes wrong in a tracker is a warning, and the work goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        on_warning(f"{name}: {redact(reason)[:500]}; {folder.path} has everything")
