"""The interface of everything that follows a run: phases, records, and messages for people."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from raydist.track.records import Record


class Listener:
    """The methods of this base class do nothing; a listener overrides those that it needs.

    They are called in the driver's process, `message` and `prepare` from any thread. A listener is a
    context manager: what it displays is removed when the block ends.
    """

    def history(self, records: Sequence[Record]) -> None:
        """What the run recorded before this driver, in the order written. Called before its first attempt."""

    def phase(self, name: str, detail: str = "") -> None:
        """A phase begins: planning, preparing, training, ..."""

    def progress(self, name: str, done: int, total: int) -> None:
        """How much of the phase `name`, which may begin with this call, is done; total 0: not known."""

    def prepare(self, done: int, total: int, documents: int, tokens: int) -> None:
        """`done` of `total` slices of a token log are prepared, with so many documents and tokens."""

    def trials(self, done: int, total: int, best: float) -> None:
        """`done` of `total` trials of a sweep have ended; `best`: the lowest bits per byte so far."""

    def record(self, record: Record) -> None:
        """A record of the run; they come in order. Kinds start and resume have `steps`, the run's total."""

    def message(self, text: str) -> None:
        """A line for people, which stays on the screen: a warning, a lost worker, ..."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
