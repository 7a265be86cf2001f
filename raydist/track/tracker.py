"""Follow a run for a tracker.

    metrics.jsonl ──Tail──> a thread each ──send──> Mlflow | TensorBoard | Wandb

A slow or absent tracker never holds up training, nor another one. What a killed driver had not sent is sent
by the next one, since each sink says from where on it lacks records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from raydist.track.records import Record, Tail, redact

LONGEST_DELAY_SECONDS = 60.0

Warn = Callable[[str], None]


class Sink(Protocol):
    """Where records go."""

    @property
    def offset(self) -> int:
        """The byte of metrics.jsonl at which the records begin that it lacks."""

    def send(self, records: list[Record], offset: int) -> None:
        """Take records, after which its offset is `offset`; those of a call that failed come again."""

    def close(self, state: str) -> None:
        """`state` is the run's last: finished, failed, stopped."""


class Tracker:
    """Follows the run in folder `run` from a thread of its own until `finish`; making it returns at once.

    `make` makes the sink; it and `on_warning` are called from that thread, the latter once, with the first
    thing that went wrong in `name`. What could not be sent is tried again until the run ends.
    """

    def __init__(
        self, make: Callable[[], Sink], name: str, run: Path, on_warning: Warn, poll_seconds: float = 2.0
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
        with self._telling():
            if self._thread.is_alive():
                raise TimeoutError(f"no answer within {timeout_seconds:g} s")

    def _work(self) -> None:
        delay = self._poll_seconds
        while not self._ending.wait(delay):
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            with self._telling():
                self._send()
                delay = self._poll_seconds
        with self._telling():
            self._send()
            self._sink.close(self._state)

    def _send(self) -> None:
        tail = Tail(self._run / "metrics.jsonl", self._sink.offset)
        if records := tail.poll():
            self._sink.send(records, tail.offset)

    @cached_property
    def _sink(self) -> Sink:
        """Made in the thread, and tried again until that succeeds."""
        return self._make()

    def _telling(self) -> AbstractContextManager[None]:
        return telling(self._name, self._run, self._warn)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)


@contextmanager
def telling(name: str, folder: Path, on_warning: Warn) -> Iterator[None]:
    """Whatever a tracker does is a warning, and the work goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        on_warning(f"{name}: {redact(reason)[:500]}; {folder} has everything")
