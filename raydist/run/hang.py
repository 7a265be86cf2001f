"""A driver's eye on an attempt that makes no progress: says so, asks for the stacks, ends it in the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from raydist.errors import RaydistError, Stopped, WorkerLost
from raydist.folder import RunFolder
from raydist.track.records import Record
from raydist.track.silence import silence
from raydist.training.beat import BEAT_SECONDS, ask_for_stacks

LOOK_SECONDS = 2.0
STACKS_SECONDS = 3 * BEAT_SECONDS
"""So long the ranks have to write their stacks before they are ended."""
RECENT_STEPS = 20


class HangWatch:
    """Of one attempt. hang_timeout: seconds without progress after which its ranks are ended; None: never."""

    def __init__(
        self, folder: RunFolder, attempt: int, hang_timeout: float | None, say: Callable[[str], None]
    ) -> None:
        self._folder, self._attempt, self._timeout, self._say = folder, attempt, hang_timeout, say
        self._ranks = folder.ranks(attempt)
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._looked = self._asked = 0.0
        self._say_at = 0.0
        self.ended = ""

    def record(self, record: Record) -> None:
        if record["kind"] == "train":
            self._step_seconds.append(record["step_seconds"])

    def look(self) -> None:
        """To be called again and again; looks at the ranks every LOOK_SECONDS."""
        now = time.monotonic()
        if self.ended or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        found = silence(self._folder, self._attempt, self._step_seconds)
        over = found is not None and self._timeout is not None and found.seconds > self._timeout
        if found is None or not (found.is_long or over):
            if self._say_at:
                self._say("the run goes on")
            self._say_at = 0.0
            return
        if not self._say_at:
            ask_for_stacks(self._ranks)
            self._asked = now
        if found.seconds >= self._say_at:
            self._say(found.text(self._ranks))
            self._say_at = 2 * found.seconds
        if over and now - self._asked > STACKS_SECONDS:
            from raydist.cluster.ranks import end_ranks

            self.ended = found.text(self._ranks)
            end_ranks(found.beats)

    def explained(self, error: RaydistError) -> RaydistError:
        """What ended the attempt: the hang, where the ranks were ended for it."""
        if not self.ended or isinstance(error, Stopped):
            return error
        asked = f"scaling.hang_timeout is {self._timeout:g} s"
        return WorkerLost(f"the workers hung: {self.ended}", where=str(self._ranks), why=asked)
