"""Files that native code decodes, parquet and Arrow, are read in another process: damage can crash that code.

    read, cut ─▶ _Decoder ══ socket ══ serve ─▶ Reader.read, Reader.cut
     Opened ◀──────────────── asks for bytes

This process opens the file and hands over the bytes that the other one asks for, one list of items at a time.
A decoder serves many files, ends after a while without work, and is started again after a crash. It is the
file's fault if a second decoder crashes at the same place. One that was killed, as by the kernel when memory
runs out, says nothing about the file.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from itertools import count, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, cast

from raydist.corpus.formats.reader import Cut
from raydist.corpus.formats.records import Bad, Item, Part, ReadOptions, Record, Torn
from raydist.corpus.formats.streams import Opened
from raydist.corpus.formats.table import reader_of
from raydist.errors import CorpusError

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    f" from {__name__} import serve; serve(int(sys.argv[2]))"
)
MORE = "more"
IDLE_SECONDS = 60.0
PATIENCE_SECONDS = 600.0
"""A decoder that computes for longer without an answer hangs."""
CRASHES, KILLS = 2, 3
"""So many of one kind, at the same place, are the last."""
CRASHED_UNITS = 4
"""A part's rest is given up once so many of its row groups or record batches crashed: each takes a second."""
DENSEST, SPARE_BYTES = 2**15, 2**30
"""Bytes that a byte of a file expands to at most: of all compressions zstd does most, 4 bytes to 128 KiB."""
KILLED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class _Ended(Exception):
    """The decoder ended, or it hangs. is_crash: it ended itself, and not by a signal from outside."""

    def __init__(self, how: str, *, is_crash: bool) -> None:
        super().__init__(how)
        self.is_crash = is_crash


class _Crash(Bad):
    """The decoder crashed."""

    __slots__ = ()


def read(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """As `Reader.read`; what the decoder crashes on is one Bad.

    Raises CorpusError if decoders are killed, or lack memory.
    """
    given = crashes = kills = 0
    while crashes < CRASHES:
        try:
            for packed in islice(_answers(stream, "read", part, options), given, None):
                given, crashes, kills = given + 1, 0, 0
                yield _unpacked(packed)
            return
        except _Ended as ended:
            how = str(ended)
            crashes, kills = crashes + ended.is_crash, kills + (not ended.is_crash)
            if kills == KILLS:
                raise _killed(stream, how) from ended
    units = range(part.start, int(_answer(stream, "count") or 0) if part.is_whole else part.end)
    if len(units) > 1:
        yield from islice(_unit_by_unit(stream, part, units, options), given, None)
    else:
        what = "it" if part.is_whole else f"its {reader_of(stream.file).unit} {part.start}"
        yield [_Crash(None, f"the decoder crashed ({how}) on {what}: the file is damaged")]


def _unit_by_unit(stream: Opened, part: Part, units: range, options: ReadOptions) -> Iterator[list[Item]]:
    """The lists of the whole part up to the unit that the decoder crashes on, and of those after it."""
    crashed = 0
    for unit in units:
        if crashed == CRASHED_UNITS:
            what = f"{reader_of(stream.file).unit} {unit}" + (f" to {units[-1]}" if unit < units[-1] else "")
            yield [Bad(None, f"the decoder crashed on {crashed} of its parts before: {what} was not read")]
            return
        for items in read(stream, Part(part.file, unit, unit + 1), options):
            crashed += isinstance(items[0], _Crash)
            yield items


def cut(stream: Opened, n_bytes: int, options: ReadOptions) -> list[Cut]:
    """As `Reader.cut`; [] if the decoder crashes: reading the file as a whole says so."""
    cuts: list[Cut] | None = _answer(stream, "cut", n_bytes, options)
    return cuts or []


def _answer(stream: Opened, *request: Any) -> Any:
    """The one answer to `request`; None if the decoder crashes on it."""
    crashes = kills = 0
    while crashes < CRASHES:
        try:
            return next(_answers(stream, *request))
        except _Ended as ended:
            crashes, kills = crashes + ended.is_crash, kills + (not ended.is_crash)
            if kills == KILLS:
                raise _killed(stream, str(ended)) from ended
    return None


def _killed(stream: Opened, how: str) -> CorpusError:
    return CorpusError(
        f"the process that decodes {stream.file.name} was killed {KILLS} times ({how})",
        where=stream.file.location,
        why="something outside of it killed it: as a rule the kernel, when memory runs out",
        fix="free memory or run fewer tasks at once, then run again; if the file is damaged, leave it out by"
        " the source's exclude",
    )


# --- this process: decoders that are started, lent and asked


class _Decoder:
    """A process that decodes. Only the process that started it may use it."""

    def __init__(self) -> None:
        """Raises CorpusError if it does not start, which is no file's fault."""
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path), str(theirs.fileno())]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.owner = os.getpid()
        theirs.close()
        try:
            self.receive()
        except _Ended as ended:
            raise CorpusError(
                f"the process that decodes parquet and Arrow files does not start ({ended})",
                where=sys.executable, why="what it printed says why",
                fix="remove the cause (as a rule too little memory), then run again",
            ) from ended  # fmt: skip

    def receive(self) -> Any:
        """Raises _Ended."""
        try:
            if self.connection.poll(PATIENCE_SECONDS):
                return self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        except Exception:  # noqa: BLE001 - nothing that can be unpickled: a crash that wrote before it struck
            self.end()
            raise _Ended("its answer is damaged", is_crash=True) from None
        self.end()
        raise _Ended(f"no answer for {PATIENCE_SECONDS:.0f} s", is_crash=True)

    def send(self, message: Any) -> None:
        """Raises _Ended."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> _Ended:
        code = self.process.wait()
        if code >= 0:
            return _Ended(f"exit status {code}", is_crash=code > 0)
        number = signal.Signals(-code)
        return _Ended(f"signal {number.name}", is_crash=number not in KILLED)

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_idle: list[_Decoder] = []
_lock = threading.Lock()


@contextmanager
def _borrowed() -> Iterator[_Decoder]:
    """A decoder that nobody else uses meanwhile. After an error it is not used again."""
    decoder = _take_idle() or _Decoder()
    try:
        yield decoder
    except BaseException:
        decoder.end()
        raise
    with _lock:
        _idle.append(decoder)


def _take_idle() -> _Decoder | None:
    with _lock:
        own = [decoder for decoder in _idle if decoder.owner == os.getpid()]
        for decoder in own:
            _idle.remove(decoder)
            if decoder.process.poll() is None:
                return decoder
            decoder.connection.close()
    return None


@atexit.register
def _end_idle() -> None:
    while decoder := _take_idle():
        decoder.end()


def _answers(stream: Opened, *request: Any) -> Iterator[Any]:
    """What a decoder answers to `request`, one thing at a time. Raises _Ended, CorpusError."""
    with _borrowed() as decoder:
        decoder.send((stream.file, stream.encoding, *request))
        while True:
            kind, answer = decoder.receive()
            if kind == "bytes":
                position, size = answer
                stream.seek(position)
                decoder.send(stream.read(size))
                continue
            if kind == "end":
                return
            if kind == "no memory":
                raise _no_memory(stream, answer)
            try:
                yield answer
            except GeneratorExit:
                return  # it waits, and will take another request as well
            decoder.send(MORE)


def _no_memory(stream: Opened, error: str) -> CorpusError:
    return CorpusError(
        f"there is too little memory to decode {stream.file.name}", where=stream.file.location, why=error,
        fix="free memory, or write the file with smaller row groups or record batches; if it is damaged,"
        " leave it out by the source's exclude",
    )  # fmt: skip


# --- the other process


def serve(socket: int) -> None:
    """Answers one request after the other, until the other side ends or has not asked for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(socket)
    connection.send(("ready", None))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # native code prints why it aborts
    request = None
    with suppress(EOFError, OSError):
        while request or connection.poll(IDLE_SECONDS):
            request = _serve_one(connection, request or connection.recv())


def _serve_one(connection: Connection, request: Any) -> Any:
    """None, or the next request where one came before the end of this one."""
    file, encoding, *asked = request
    try:
        with Opened(file, encoding, cast(BufferedIOBase, _Asked(connection, file.size))) as stream:
            for answer in _answer_of(stream, *asked):
                connection.send(("answer", answer))
                if (message := connection.recv()) != MORE:
                    return message
        connection.send(("end", None))
    except MemoryError as error:
        connection.send(("no memory", str(error)))
    return None


def _answer_of(stream: Opened, what: str, *given: Any) -> Iterator[Any]:
    """None for a count or cuts that damage does not let be found."""
    reader = reader_of(stream.file)
    assert reader.count is not None and reader.cut is not None
    try:
        if what == "count":
            yield reader.count(stream)
        elif what == "cut":
            yield reader.cut(stream, *given)
        else:
            yield from map(_packed, reader.read(stream, *given))
    except MemoryError as error:
        if not _is_damage(error, stream.file.size):
            raise
        yield _damaged(what, f"the file is damaged: {error}, and it is too small to need as much")
    except Torn as error:
        yield _damaged(what, str(error))
    except Exception as error:  # noqa: BLE001 - damage that passed all checks until here
        yield _damaged(what, f"the file is damaged: {type(error).__name__}: {error}")


def _damaged(what: str, reason: str) -> Any:
    return _packed([Bad(None, reason)]) if what == "read" else None


def _is_damage(error: MemoryError, file_bytes: int) -> bool:
    """Whether so much memory was asked for that no sound file of this size can need it."""
    asked = re.search(r"of size (\d+)", str(error))
    return asked is not None and int(asked[1]) > file_bytes * DENSEST + SPARE_BYTES


def _packed(items: list[Item]) -> tuple[list[str] | list[Item], int | None]:
    """Texts alone, and the first one's row, where no item is bad: the way of most, and the fast one."""
    texts = [item.text for item in items if isinstance(item, Record)]
    return (texts, items[0].row) if texts and len(texts) == len(items) else (items, None)


def _unpacked(packed: Any) -> list[Item]:
    items, first = packed
    if first is None:
        return cast(list[Item], items)
    return list(map(Record._make, zip(items, count(first), strict=False)))


class _Asked:
    """A file whose bytes the other process reads: position and size are known here."""

    closed = False

    def __init__(self, connection: Connection, size: int) -> None:
        self._connection, self._size, self._position = connection, size, 0

    def read(self, size: int = -1) -> bytes:
        """A damaged length may ask for more than there is, which is not to be allocated."""
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        if not size:
            return b""
        self._connection.send(("bytes", (self._position, size)))
        block: bytes = self._connection.recv()
        self._position += len(block)
        return block

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self.closed = True
