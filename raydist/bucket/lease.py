"""Who may write: an object that its holder renews. It takes the place of flock where there is no file system.

The holder writes a heartbeat every few seconds. Whoever waits takes the lease once no heartbeat came for a
while by the waiter's own clock, so that clocks need not agree. Each write is conditional: of two who take it,
one wins; a holder that was cut off for long finds at its next heartbeat that it holds nothing any more.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psutil

from raydist.bucket.mirror import Object, object_at
from raydist.bucket.objects import Changed, Exists, Missing, Version
from raydist.errors import RunBusy, StorageError

BEAT_SECONDS = 4.0
EXPIRES_SECONDS = 20.0
LOOK_SECONDS = 1.0


class Lease:
    """Held by this process from `take` to `release`. lost: another one has it."""

    def __init__(self, path: Path) -> None:
        self._place = object_at(path)
        self._owner = uuid.uuid4().hex
        self._version: Version | None = None
        self._ended, self.lost = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, wait_seconds: float) -> None:
        """Raises RunBusy, naming the holder, once a heartbeat of it came and wait_seconds are over."""
        deadline, seen, since = time.monotonic() + wait_seconds, None, time.monotonic()
        while True:
            found = _read(self._place)
            if found is None:
                with contextlib.suppress(Exists):
                    self._version = self._place.bucket.create(self._place.key, self._content())
                    break
                continue
            held, version = found
            if version != seen:
                if seen is not None and time.monotonic() >= deadline:
                    raise self._busy(held)
                seen, since = version, time.monotonic()
            if held.get("released") or _is_dead(held) or time.monotonic() - since >= EXPIRES_SECONDS:
                with contextlib.suppress(Changed):
                    self._version = self._place.bucket.replace(self._place.key, self._content(), version)
                    break
                continue
            time.sleep(LOOK_SECONDS)
        self._thread = threading.Thread(target=self._beat, name="raydist-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._version is not None and not self.lost.is_set():
            with contextlib.suppress(Changed, StorageError):
                self._place.bucket.replace(self._place.key, self._content(released=True), self._version)

    def require(self) -> None:
        """Raises RunBusy where another process has taken it meanwhile."""
        if self.lost.is_set():
            found = _read(self._place)
            raise self._busy(found[0] if found else {})

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            assert self._version is not None
            try:
                self._version = self._place.bucket.replace(self._place.key, self._content(), self._version)
            except Changed:
                self.lost.set()
                return
            except StorageError:
                continue  # while the store does not answer, nobody else can take it either

    def _content(self, **more: Any) -> bytes:
        process = psutil.Process()
        held = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "boot": psutil.boot_time(),
            "beat": uuid.uuid4().hex,  # so that each heartbeat is another version
        }
        return orjson.dumps({**held, **more})

    def _busy(self, held: dict[str, Any]) -> RunBusy:
        return RunBusy(
            f"another process is writing the run {Path(self._place.key).parent.name}",
            where=f"{self._place.bucket.uri}/{Path(self._place.key).parent}, held by {named(held)}",
            why="two writers would mix their checkpoints",
            fix="wait for it, or stop it with raydist stop",
        )


def _read(place: Object) -> tuple[dict[str, Any], Version] | None:
    """What the lease says, and its version; None where there is none."""
    try:
        content, version = place.bucket.get(place.key)
    except Missing:
        return None
    try:
        held = orjson.loads(content)
    except ValueError:
        held = {}
    return held if isinstance(held, dict) else {}, version


def named(held: dict[str, Any]) -> str:
    return f"process {held.get('pid', '?')} on {held.get('host', '?')}"


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine that is not there any more."""
    if held.get("host") != socket.gethostname() or abs(held.get("boot", 0) - psutil.boot_time()) > 2:
        return False
    try:
        return bool(abs(psutil.Process(held["pid"]).create_time() - held["started"]) > 1)
    except (psutil.NoSuchProcess, KeyError):
        return True
    except psutil.Error:
        return False


def holder(path: Path) -> str:
    """Who holds the lease of a mirror's path, as its last heartbeat says; empty if nobody does."""
    place = object_at(path)
    found, listed = _read(place), place.bucket.head(place.key)
    if found is None or listed is None:
        return ""
    held, _ = found
    if held.get("released") or _is_dead(held):
        return ""
    age = (datetime.now(UTC) - listed.modified).total_seconds()
    return named(held) if age < 2 * EXPIRES_SECONDS else ""


@contextmanager
def held(path: Path, wait_seconds: float) -> Iterator[Lease]:
    lease = Lease(path)
    lease.take(wait_seconds)
    try:
        yield lease
    finally:
        lease.release()
