"""A driver's answer to the notice that a node will be taken away: a checkpoint at once, one before it goes.

    Ray drains a node ─▶ look, every few seconds ─▶ the run's folder ─▶ rank 0: CommitOnRequest

Training goes on until the node is gone, which costs what was trained since the second checkpoint; the next
attempt runs where there is room. Ray places nothing on a node that it drains.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from raydist.cluster.drain import draining_hosts
from raydist.folder import RunFolder
from raydist.track.records import Record
from raydist.training.beat import read_beats
from raydist.training.commit_request import ask_for_commit

LOOK_SECONDS = 2.0
SPARE_SECONDS = 5.0
"""The last checkpoint is begun so long before the node goes, and 1.5 times as long as the first one took."""


class NoticeWatch:
    """Of one attempt. hosts: those that go away, and when; may be asked every few seconds."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        say: Callable[[str], None],
        *,
        hosts: Callable[[], dict[str, float]] = draining_hosts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._attempt, self._say, self._hosts, self._clock = folder, attempt, say, hosts, clock
        self._noticed: dict[str, float] = {}
        self._last: set[str] = set()
        self._looked = self._took = 0.0
        self._asked: float | None = None

    def record(self, record: Record) -> None:
        if record["kind"] == "commit" and self._asked is not None:
            self._took, self._asked = self._clock() - self._asked, None
            self._say(
                f"the checkpoint of step {record['step']} counts, {self._took:.1f} s after it was asked for"
            )

    def look(self) -> None:
        """To be called again and again. Raises ClusterLost."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        ours = {beat.host for beat in read_beats(self._folder.ranks(self._attempt))}
        going = {host: at for host, at in self._hosts().items() if host in ours}
        for host in going.keys() - self._noticed.keys():
            when = f" in {going[host] - now:.0f} s" if going[host] else ""
            self._ask(f"{host} will be taken away{when}: a checkpoint is made now")
        self._noticed |= going
        lead = SPARE_SECONDS + 1.5 * self._took
        for host in {host for host, at in going.items() if at and now >= at - lead} - self._last:
            self._last.add(host)
            if self._asked is None:  # else the first one is still being made
                self._ask(f"{host} is about to be taken away: one more checkpoint is made")

    def _ask(self, text: str) -> None:
        self._say(text)
        self._asked = self._clock()
        ask_for_commit(self._folder, self._attempt)
