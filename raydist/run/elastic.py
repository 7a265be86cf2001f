"""How many workers each attempt of a run has, where its job gives a range of them.

    room on the nodes ──> Workers ──> an attempt of that size ──> Growth ──> room for more, for a while:
          ▲                                   │                             a checkpoint, and the next attempt
          └────────── a lost node ────────────┘                                              │
          └──────────────────────────────────────────────────────────────────────────────────┘

An attempt has one number of workers from its start to its end. A fixed number passes through here unchanged.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from raydist import files
from raydist.background import in_background
from raydist.cluster.groups import Wishes, group_of
from raydist.cluster.resources import (
    FREE,
    Resources,
    free_resources,
    may_grow_to,
    node_resources,
    room,
)
from raydist.errors import RaydistError
from raydist.folder import RunFolder
from raydist.job.plan import sized
from raydist.job.schema import Job
from raydist.track.humanize import workers
from raydist.track.records import Record
from raydist.training.attempt_spec import AttemptSpec

SETTLE_SECONDS = 3.0
"""So long what an attempt before held may take to be free again."""
LOOK_SECONDS = 5.0
LOOKS = 2
"""Room must be there at so many looks, one after another, before a run grows."""

RESTARTS = 20
"""`grow_after: auto` is so many times what the attempt's start took: starts take at most 5% of the time."""
STARTED = ("start", "imports", "load", "compile", "probe")
LONGEST_WAIT_SECONDS = 60.0
"""What of `start` counts as a cost: more than this was a wait for nodes."""
RECENT_STEPS = 20


class Workers:
    """Chooses the number of workers of one attempt after another."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self._limit: int | None = None

    def of_next_attempt(self) -> tuple[Job, list[Resources]]:
        """The job with the number of workers that there is room for, and the nodes.

        The least, where there is room for fewer: the attempt waits for nodes then. Raises ClusterLost where
        Ray's own processes have ended.
        """
        if not self._job.scaling.elastic:
            return self._job, node_resources()
        self._decide_on_gpus()
        scaling, limit = self._job.scaling, self._limit or self._job.scaling.most
        self._limit = None
        last = self._folder.next_attempt() - 1
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            nodes = free_resources(group_of(self._folder, last))
            found = room(self._job, nodes)
            if found >= min(limit, room(self._job, _idle(nodes))) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if found < scaling.least:
            return sized(self._job, scaling.least), _idle(nodes)
        return sized(self._job, min(found, limit)), nodes

    def take_fewer(self, had: int) -> bool:
        """Ray found no room for `had` workers: the next attempt has fewer. False if these are the least."""
        self._limit = had - 1
        return self._limit >= self._job.scaling.least

    def _decide_on_gpus(self) -> None:
        """For all attempts: a run that lost GPUs must not go on on CPUs."""
        scaling = self._job.scaling
        if scaling.use_gpu == "auto":
            on_gpus = scaling.on_gpus(sum(node.get("GPU", 0) for node in node_resources()))
            update = {"scaling": scaling.model_copy(update={"use_gpu": on_gpus})}
            self._job = self._job.model_copy(update=update)


def _idle(nodes: list[Resources]) -> list[Resources]:
    """The nodes as if nobody else had reserved anything."""
    return [{name: n for name, n in node.items() if not name.startswith(FREE)} for node in nodes]


class Growth:
    """Looks for room for more workers while an attempt trains with fewer than the most.

    say: told when the attempt is asked to end for it.  count: how many there is room for; by default Ray is
    asked.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        spec: AttemptSpec,
        say: Callable[[str], None],
        *,
        count: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scaling = job.scaling.model_copy(update={"use_gpu": spec.job.scaling.use_gpu})
        self._job, self._folder, self._say = job.model_copy(update={"scaling": scaling}), folder, say
        self._spec, self._size = spec, spec.plan.world_size
        self._count, self._clock, self._asks_ray = count or self._room, clock, count is None
        self._on_gpus = spec.job.scaling.use_gpu is True
        self._done = self._size >= job.scaling.most
        self._began: float | None = None
        self._restart_seconds, self._step, self._steps = 0.0, 0, spec.plan.steps
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._next_look, self._found = 0.0, list[int]()
        self._looking: Future[int] | None = None
        self._wishes, self._wishing = Wishes(), list[Future[None]]()

    @property
    def looking(self) -> list[Future[Any]]:
        """What threads do on Ray."""
        return [*self._wishing, *([self._looking] if self._looking is not None else [])]

    def record(self, record: Record) -> None:
        """A record of the attempt, as it is written."""
        if record["kind"] in ("start", "resume"):
            seconds = record.get("seconds", {})
            waited = max(0.0, seconds.get("start", 0.0) - LONGEST_WAIT_SECONDS)
            self._restart_seconds = sum(seconds.get(name, 0.0) for name in STARTED) - waited
            self._began = self._clock()
        elif record["kind"] == "train":
            self._step = record["step"]
            self._step_seconds.append(record["step_seconds"])

    def look(self) -> None:
        """To be called again and again; looks every LOOK_SECONDS, in a thread, once the attempt is due."""
        if self._done or self._began is None:
            return
        if self._asks_ray and not self._wishing:  # early, since nodes take minutes to come
            self._wishing.append(in_background(self._wish, "wish"))
        now = self._clock()
        if self._looking is None:
            if now >= self._next_look and self._is_due(now - self._began):
                self._next_look = now + LOOK_SECONDS
                self._looking = in_background(self._count, "room")
        elif self._looking.done():
            looked, self._looking = self._looking, None
            found = looked.result() if looked.exception() is None else 0
            self._found = [*self._found[1 - LOOKS :], found] if found > self._size else []
            if len(self._found) == LOOKS and self._is_worth(min(self._found)):
                self._ask(min(self._found))

    def close(self) -> None:
        """The attempt has ended. Not to be called where Ray is lost."""
        if self._wishes.ids:
            wait([in_background(self._wishes.withdraw, "wishes")], SETTLE_SECONDS)

    def _wish(self) -> None:
        """Ask for nodes where an autoscaler could add some."""
        if may_grow_to() > sum(node.get("CPU", 0) for node in node_resources()):
            each = {"CPU": float(self._spec.cpus), **({"GPU": 1.0} if self._on_gpus else {})}
            self._wishes.make(self._job.scaling.most - self._size, each)

    def _room(self) -> int:
        try:
            ours = group_of(self._folder, self._spec.attempt) | self._wishes.ids
            return room(self._job, free_resources(ours))
        except RaydistError:
            return 0  # Ray is lost, which the driver sees by itself

    def _is_due(self, seconds: float) -> bool:
        """Whether the attempt has trained long enough."""
        after = self._job.scaling.grow_after
        return seconds >= (RESTARTS * self._restart_seconds if after == "auto" else after)

    def _is_worth(self, found: int) -> bool:
        """Whether the rest takes less time with so many, as far as steps are faster in proportion."""
        if self._job.scaling.grow_after != "auto":
            return True
        each = sorted(self._step_seconds)[len(self._step_seconds) // 2] if self._step_seconds else 0.0
        left = (self._steps - self._step) * each
        return left * (1 - self._size / found) > self._restart_seconds

    def _ask(self, found: int) -> None:
        self._done = True
        files.write_json(self._folder.resize_flag(self._spec.attempt), {"workers": found})
        self._say(f"there is room for {workers(found)}: going on with them after a checkpoint")
