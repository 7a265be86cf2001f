"""A rank's signs of life while it trains, and its stacks when somebody asks for them.

    a thread of the rank ──▶ ranks/rank-0.json, every few seconds ──▶ track.silence: driver, `raydist status`
                         ◀── ranks/ask, from the driver, where no step is made
                         ──▶ ranks/rank-0.txt: the stacks of all its threads

A process that is stopped (SIGSTOP), or whose host is gone, gives no sign at all: its file grows old.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import orjson
import psutil

from raydist import files
from raydist.bucket import mirror
from raydist.errors import RaydistError, StorageError
from raydist.places import uri_of
from raydist.training.phases import Phases

BEAT_SECONDS = 3.0
TIMES_REMOTE = 2
"""So much rarer are signs in a bucket, where each is a few requests."""
ASK = "ask"


@dataclass(frozen=True)
class Beat:
    """phase: where the rank is.  quiet_seconds: without progress, at `time`, in seconds since 1970.

    started: when the process was, as psutil says, which tells it from a later one of the same id.
    """

    rank: int
    pid: int
    host: str
    started: float
    phase: str
    quiet_seconds: float
    time: float


@contextlib.contextmanager
def beating(ranks: Path, rank: int, phases: Phases, *, every: float = BEAT_SECONDS) -> Iterator[None]:
    """Signs of life in the folder `ranks` until the block ends, `every` so many seconds."""
    ranks.mkdir(parents=True, exist_ok=True)
    stacks, done = ranks / f"rank-{rank}.txt", threading.Event()
    with stacks.open("w") as stream:
        thread = threading.Thread(
            target=_beat, args=(ranks, rank, phases, stream, done, every), name="raydist-beat", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(RaydistError):
        files.remove(_beat_file(ranks, rank))
    if not stacks.stat().st_size:
        stacks.unlink()


def read_beats(ranks: Path) -> list[Beat]:
    """The last sign of life of each rank that is there, by rank."""
    with contextlib.suppress(StorageError):  # the next look may succeed
        mirror.pull(ranks)
    beats = []
    for path in ranks.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # the rank ends right now
            beats.append(Beat(**orjson.loads(path.read_bytes())))
    return sorted(beats, key=lambda beat: beat.rank)


def ask_for_stacks(ranks: Path) -> None:
    """Every rank that can adds the stacks of its threads to its file."""
    (ranks / ASK).write_text(str(time.time()))
    with contextlib.suppress(StorageError):
        mirror.publish(ranks / ASK)


def _beat(
    ranks: Path, rank: int, phases: Phases, stream: TextIO, done: threading.Event, every: float
) -> None:
    process = psutil.Process()
    path, answered, remote = _beat_file(ranks, rank), "", uri_of(ranks) is not None
    while True:
        # a thread of C writes the stacks where this one cannot run any more, as something holds the GIL
        faulthandler.dump_traceback_later(10 * every, file=stream)
        beat = Beat(
            rank=rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            started=process.create_time(),
            phase=phases.running,
            quiet_seconds=phases.quiet_seconds(),
            time=time.time(),
        )
        with contextlib.suppress(OSError):  # the training meets a full disk itself
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(orjson.dumps(asdict(beat)))
            temporary.replace(path)
            asked = (ranks / ASK).read_text() if (ranks / ASK).exists() else ""
            if asked != answered:
                faulthandler.dump_traceback(stream, all_threads=True)
                answered = asked
        if remote:
            with contextlib.suppress(RaydistError, OSError):
                mirror.publish(path)
                mirror.pull_file(ranks / ASK)
                if os.fstat(stream.fileno()).st_size:
                    mirror.publish(Path(stream.name))
        if done.wait(every * (TIMES_REMOTE if remote else 1)):
            return


def _beat_file(ranks: Path, rank: int) -> Path:
    return ranks / f"rank-{rank}.json"
