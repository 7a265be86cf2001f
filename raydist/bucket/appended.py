"""Records that are appended, on a store whose objects cannot grow: numbered parts, joined again by who reads.

    <name>.parts/<part>       some whole lines each, in the order of their names; later parts have later names
    <name>                    on a node: the parts joined, as far as they were there at the last look

A part is created, never replaced, so that of two writers of one number only one succeeds.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from raydist.bucket.mirror import locked, object_at
from raydist.bucket.objects import Bucket, Missing

FLUSH_SECONDS = 2.0


_open: dict[Path, _Appender] = {}
"""Of this process, by file."""


@contextmanager
def appending(path: Path, writer: str) -> Iterator[None]:
    """This process appends lines to a file of a mirror until the block ends. writer: begins the parts' names;
    nobody else may use it.

    Raises Exists where somebody does.
    """
    _open[path] = appender = _Appender(path, writer)
    try:
        yield
    finally:
        del _open[path]
        appender.close()


def append(path: Path, line: bytes) -> None:
    """line: without its newline. It is in the bucket after a few seconds, and after `flush`.

    Raises what went wrong with earlier lines.
    """
    _open[path].append(line)


def flush(path: Path) -> None:
    if path in _open:
        _open[path].flush()


class _Appender:
    def __init__(self, path: Path, writer: str) -> None:
        self._place, self._writer = _parts(path), writer
        self._lines: list[bytes] = []
        self._lock, self._number = threading.RLock(), 0
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._flush_often, name="raydist-records", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        if self._error is not None:
            raise self._error
        with self._lock:
            self._lines.append(line)

    def flush(self) -> None:
        bucket, prefix = self._place
        with self._lock:
            if self._lines:
                content = b"".join(line + b"\n" for line in self._lines)
                bucket.create(f"{prefix}{self._writer}-{self._number:06d}", content)
                self._number, self._lines = self._number + 1, []

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.flush()

    def _flush_often(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - the next append raises it
                self._error = error
                return


def _parts(path: Path) -> tuple[Bucket, str]:
    """The bucket, and the prefix of the file's parts."""
    place = object_at(path)
    return place.bucket, f"{place.key}.parts/"


def append_part(path: Path, content: bytes, number: int) -> None:
    """Add some whole lines. number: of lines before them. Raises Exists where another writer was first."""
    bucket, prefix = _parts(path)
    bucket.create(f"{prefix}{number:08d}", content)
    join(path)


def rewrite(path: Path, content: bytes) -> None:
    """Replace all parts by one. A writer alone may do it."""
    bucket, prefix = _parts(path)
    there = [each.key for each in bucket.listed(prefix)]
    first = f"{prefix}{0:08d}"
    bucket.put(first, content)
    bucket.delete(*(key for key in there if key != first))
    forget(path)
    join(path)


def join(path: Path) -> None:
    """Append to the file what the bucket has more of it. Any process of the node may call it at any time."""
    bucket, prefix = _parts(path)
    with locked(path):
        seen, end = _seen(path)
        if path.exists() and path.stat().st_size > end:
            os.truncate(path, end)  # a process was killed between the two writes below
        new = [each.key for each in bucket.listed(prefix, after=seen or None)]
        if not new:
            return
        with path.open("ab") as stream:
            for key in new:
                with contextlib.suppress(Missing):
                    content, _ = bucket.get(key)
                    end += stream.write(content)
        _index(path).write_bytes(orjson.dumps([new[-1], end]))


def forget(path: Path) -> None:
    """Join all parts again at the next look."""
    with locked(path):
        _index(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _seen(path: Path) -> tuple[str, int]:
    """The last part that is in the file, and where it ends there."""
    size = path.stat().st_size if path.exists() else 0
    try:
        key, end = orjson.loads(_index(path).read_bytes())
    except (FileNotFoundError, ValueError):
        return "", 0
    return (str(key), int(end)) if int(end) <= size else ("", 0)


def _index(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts.json")
