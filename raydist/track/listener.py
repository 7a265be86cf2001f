"""What hears of a run while it goes on: its phases, its records, and messages for people."""

from __future__ import annotations

from types import TracebackType

from raydist.track.records import Record


class Listener:
    """Each method does nothing here; a listener overrides those that it needs.

    Methods are called in the driver's process, `message` and `prepare` from any thread. A listener is a
    context manager: whatever it shows, it shows until the block ends.
    """

    def phase(self, name: str, detail: str = "") -> None:
        """What is done from now on: planning, preparing, training, ..."""

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        """`done` of `total` slices of a token log; the documents and tokens in them."""

    def trials(self, done: int, total: int, best: float) -> None:
        """`done` of `total` trials of a sweep; the least bits per byte so far."""

    def record(self, record: Record) -> None:
        """A record of the run, in order. One of kind start or resume has `steps`, the run's total."""

    def message(self, text: str) -> None:
        """A line for people that stays: a warning, a lost worker, ..."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
