"""The Ray that a driver works on: whether it is still there, and a new one in its place."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from raydist.background import in_background
from raydist.errors import ClusterLost
from raydist.own_ray import ended_part

T = TypeVar("T")

POLL_SECONDS = 0.2
ASK_SECONDS, GONE_SECONDS, SHUTDOWN_SECONDS = 2.0, 20.0, 20.0
LEAVE_SECONDS = 4.0
"""What works on a lost Ray has so long to end by itself. Ray ends a process whose threads go on to call it
once it is shut down, and one that stays connected for some 10 s without its raylet."""


class Session:
    """The Ray that this process is connected to. start: starts one in its place; None for one of others."""

    def __init__(self, start: Callable[[], None] | None = None) -> None:
        self._start = start
        self._gone = ""
        self._asked, self._silent_since = 0.0, 0.0
        self._waiting: list[Future[Any]] = []

    @property
    def can_restart(self) -> bool:
        return self._start is not None

    def lost(self) -> bool:
        """Whether Ray's own processes are gone, or the cluster has not answered for a while."""
        self._gone = self._gone or self._what_is_gone()
        return bool(self._gone)

    def require(self, *waiting: Future[Any]) -> None:
        """Raises ClusterLost once Ray is lost. waiting: what threads do on it meanwhile.

        To be called every second or so: Ray ends a process that stays connected for some 10 s without its
        raylet.
        """
        if self.lost():
            self._waiting += waiting
            raise ClusterLost(
                self._gone,
                why="it was killed, it crashed, or the machine ran out of memory",
                fix="submit again: the run goes on from its last checkpoint",
            )

    def do(self, work: Callable[[], T], name: str) -> T:
        """`work` in a thread of this name, so that this one sees when Ray is gone: then ClusterLost."""
        doing = in_background(work, name)
        while not doing.done():
            if self.lost():
                wait([doing], LEAVE_SECONDS)
            self.require(doing)
            wait([doing], POLL_SECONDS)
        if doing.exception() is not None:
            self.require(doing)  # then that is why it failed
        return doing.result()

    def do_again(self, work: Callable[[], T], name: str, restarts: int, say: Callable[[str], None]) -> T:
        """`do`, with a new Ray and from its begin, where an embedded one is lost; so often at most."""
        for _ in range(restarts):
            try:
                return self.do(work, name)
            except ClusterLost as error:
                if not self.can_restart:
                    raise
                say(f"Ray was lost; going on with the {name} ({error.what})")
            self.restart()
        return self.do(work, name)

    def restart(self) -> None:
        """A new Ray in place of the lost one. Raises ClusterLost if that one cannot be left."""
        assert self._start is not None, "a cluster of others"
        if not self.close():
            self.require()
        self._start()
        self._gone = ""

    def close(self) -> bool:
        """Disconnect; an embedded Ray ends. Where Ray is lost, its end is waited for a while: then False.

        Ray ends a process that frees one of its references while it shuts down. So what threads waited for,
        whose frames hold such references, is kept until then.
        """
        import ray

        if not self.lost():
            ray.shutdown()
            return True
        with _no_other_ray():
            ending = in_background(ray.shutdown, "shutdown")
            wait([ending], SHUTDOWN_SECONDS)
            if ending.done():
                wait(self._waiting, SHUTDOWN_SECONDS)
                self._waiting.clear()
        return ending.done()

    def _what_is_gone(self) -> str:
        """Empty while all is well."""
        from ray._private import worker

        node: Any = worker._global_node
        if node is None:
            return ""
        return ended_part() or ("" if node.head else self._silent(str(node.gcs_address)))

    def _silent(self, address: str) -> str:
        now = time.monotonic()
        if now - self._asked < ASK_SECONDS:
            return ""
        self._asked = now
        if answers(address):
            self._silent_since = 0.0
            return ""
        self._silent_since = self._silent_since or now
        silent = now - self._silent_since
        gone = f"the cluster at {address} is gone: it has not answered for {silent:.0f} s"
        return gone if silent > GONE_SECONDS else ""


@contextmanager
def _no_other_ray() -> Iterator[None]:
    """What still works on a Ray that was shut down must not start one by itself, as Ray would for it."""
    from ray._private import auto_init_hook

    before = auto_init_hook.enable_auto_connect
    auto_init_hook.enable_auto_connect = False
    try:
        yield
    finally:
        auto_init_hook.enable_auto_connect = before


def answers(address: str) -> bool:
    """Whether something listens at host:port. A host that was cut off is waited for, ASK_SECONDS."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ASK_SECONDS).close()
    except OSError:
        return False
    return True
