"""How raydist writes files: whole, by renaming a temporary file, or by appending a line.

A file of a bucket's mirror (raydist/bucket) is written to the bucket first, and then to the mirror.
Whatever a disk refuses, however deep in a library, `storage_watched` turns into a StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import xxhash

from raydist.bucket import mirror
from raydist.errors import RaydistError, RunError, StorageError

HASH_CHUNK_BYTES = 2**24


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path next to `path`; on success flush it to disk and rename it to `path`.

    A reader sees the old file or the whole new one. On an exception nothing is left behind.
    """
    with _replacing_here(path) as temporary:
        yield temporary
        mirror.publish(path, temporary)
    mirror.wrote(path)


@contextmanager
def _replacing_here(path: Path) -> Iterator[Path]:
    with mirror.temporary_for(path) as temporary:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)


def create_json(path: Path, value: Any) -> None:
    """Write a file that must not exist. In a bucket, of two writers one succeeds.

    Raises bucket.objects.Exists there.
    """
    content = json_bytes(value)
    mirror.create(path, content)
    with _replacing_here(path) as temporary:
        temporary.write_bytes(content)


def remove(path: Path) -> None:
    """No matter whether it is there."""
    mirror.remove(path)
    path.unlink(missing_ok=True)


def remove_folder(folder: Path, first: str = "") -> None:
    """With all that is in it; the file `first` before the others. No matter whether it is there."""
    mirror.remove_folder(folder, first)
    if first:
        (folder / first).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a later rename cannot reach the disk before the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Sorted keys and two-space indent, so that equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2) + b"\n"


def read_json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def measure(path: Path) -> dict[str, Any]:
    """Size in bytes and checksum of a file, as records of files have them: {size, xxh3_128}."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def append_line(path: Path, line: bytes, *, flush: bool = False) -> None:
    """line: without its newline. One that does not fit on the disk is taken back."""
    rest = memoryview(line + b"\n")
    with path.open("ab", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
            if flush:
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                stream.truncate(end)
            raise


def read_jsonl(path: Path, parse: Callable[[bytes], Any] = orjson.loads) -> list[dict[str, Any]]:
    """Every whole line of `path` as a record; [] if there is no such file. parse: raises ValueError.

    A process killed while appending leaves a last line without a newline: that line is not a record
    and is left out. Raises RunError for a whole line that is no record.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    lines = enumerate(whole.split(b"\n"), 1)
    return [_record(parse, line, path, number) for number, line in lines if line.strip()]


def _record(parse: Callable[[bytes], Any], line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = parse(line)
        if isinstance(record, dict):
            return record
        why = "it is no JSON object"
    except ValueError as error:
        why = str(error)
    raise RunError(
        f"{path.name} is damaged",
        where=f"{path}, line {number}",
        why=why,
        fix="restore the file from a copy, or remove this line if what it recorded can be done without",
    )


def cut_torn_line(path: Path) -> bool:
    """Take off a last line without its newline, which a killed writer left. Whether there was one.

    It was never a record, and must not swallow the next one.
    """
    whole, newline, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if torn:
        os.truncate(path, len(whole) + len(newline))
    return bool(torn)


def write_over(spare: Path, path: Path, content: bytes) -> None:
    """Replace `path` by the file `spare`, filled with `content`: a full disk has the room of `spare`.

    content: not more bytes than `spare` has.
    """
    with spare.open("r+b") as stream:
        stream.write(content)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())
    spare.replace(path)
    flush_to_disk(path.parent)


def like_its_folder(path: Path) -> None:
    """Let those read and write the file who may read and write its folder.

    Some libraries make files that their owner alone can read. Where a file system has no modes, all stays.
    """
    with contextlib.suppress(PermissionError):
        path.chmod(path.parent.stat().st_mode & 0o666)


# --- what a disk refuses -------------------------------------------------------------------------

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM)
REFUSALS = {
    errno.ENOSPC: ("no space is left on the disk", "free some space there"),
    errno.EDQUOT: ("the disk quota is used up", "free some space there, or have the quota raised"),
    errno.EFBIG: (
        "a file would be larger than is allowed",
        "raise the limit (ulimit -f)",
    ),
    errno.EROFS: ("the storage is read-only", "mount it for writing, or name another storage"),
    errno.EACCES: ("permission denied", "give this user access to it"),
    errno.EPERM: ("permission denied", "give this user access to it"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, or use another one"),
    errno.ESTALE: ("the shared storage does not know the file any more", "mount it again"),
}
_TEXTS = {os.strerror(code): code for code in (*FULL, errno.EROFS)}
"""Libraries in C++ pass on no more than the system's text."""


@contextmanager
def storage_watched(where: Path) -> Iterator[None]:
    """Raises StorageError for what a disk refused in the block, also deep within a library.

    where: what the block writes to, for errors that name no file.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        refused = storage_error(error, where)
        if refused is None:
            raise
        raise refused from error


def storage_error(error: BaseException, where: Path) -> StorageError | None:
    """What the disk refused, if that is the cause of `error`; None for another cause, and a RaydistError."""
    if isinstance(error, RaydistError):
        return None
    for cause in _causes(error):
        code = _refused(cause)
        if code is not None:
            named = getattr(cause, "filename", None)
            path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else where
            what, fix = REFUSALS[code]
            return StorageError(
                f"{what}: {path}",
                where=_room(path) if code in FULL else "",
                why=str(cause).strip().splitlines()[-1],
                fix=f"{fix}; then run the same command again: what was complete is kept",
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, also by Ray's and torch's own ways; each once."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        failures = getattr(cause, "failures", None)  # of torch's CheckpointException, by rank
        by_rank = list(failures.values()) if isinstance(failures, dict) else []
        inner = [cause.__cause__, cause.__context__, getattr(cause, "cause", None), *(f[0] for f in by_rank)]
        waiting += [each for each in inner if isinstance(each, BaseException)]


def _refused(error: BaseException) -> int | None:
    """The error number of a disk's refusal; None for anything else."""
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in DENIED and error.filename is None:
            return None  # a socket's or a process's, not a file's
        return error.errno if error.errno in REFUSALS else None
    text = str(error)
    numbered = re.search(r"\(os error (\d+)\)", text)  # Rust's: safetensors, tokenizers
    if numbered:
        return int(numbered[1]) if int(numbered[1]) in REFUSALS else None
    return next((code for said, code in _TEXTS.items() if said in text), None)


def _room(path: Path) -> str:
    place = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
    usage = shutil.disk_usage(place)
    return f"{place} is on a disk of {usage.total / 1e9:,.3g} GB with {usage.free / 1e9:,.3g} GB free"
