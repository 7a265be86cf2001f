"""This node's copy of a bucket: which path is which object, and how the two are brought together.

The path alone says which object it is, so that it means the same in every process and on every node; the
driver's choice of <cache> (RAYDIST_CACHE, else ~/.cache) holds on all of them. A path outside of such a
folder has no object, and every function here does nothing with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from raydist.bucket.objects import SCHEMES, Bucket, Listed, Missing, Version, open_bucket
from raydist.errors import JobError, StorageError
from raydist.places import FOLDER, split, uri_of

CACHE_VARIABLE, LIMIT_VARIABLE = "RAYDIST_CACHE", "RAYDIST_CACHE_BYTES"
FREE_SHARE = 0.8
"""Of the disk's room for the cache, where LIMIT_VARIABLE does not say how many bytes it may take."""
GRACE_SECONDS = 120.0
"""What was used or written so lately is neither removed as unknown to the bucket nor to make room."""
TRIM_BYTES = 2**30
"""The cache is measured again after so many bytes."""


@dataclass(frozen=True)
class Object:
    bucket: Bucket
    key: str


# --- paths and URIs ------------------------------------------------------------------------------


def is_remote(storage: str) -> bool:
    """Whether a storage, or a run, is given by a URI."""
    return "://" in storage


def place_of(uri: str) -> Path:
    """The folder of this node that mirrors a URI such as s3://bucket/runs. Raises JobError."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    parts = [part for part in prefix.split("/") if part]
    if scheme not in SCHEMES or not bucket or "?" in rest or {".", ".."} & set(parts):
        raise JobError(
            f"{uri} is no place for runs",
            where="storage",
            why="raydist keeps runs in folders and in buckets: "
            + ", ".join(f"{each}://bucket/prefix" for each in SCHEMES),
            fix="correct it; endpoint and region come from the environment (AWS_ENDPOINT_URL, AWS_REGION)",
        )
    cache = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache").expanduser().absolute()
    return cache.joinpath(FOLDER, SCHEMES[scheme], bucket, *parts)


def object_of(path: Path) -> Object | None:
    if (found := split(path)) is None:
        return None
    scheme, bucket, key = found
    return Object(open_bucket(f"{scheme}://{bucket}"), key)


def object_at(path: Path) -> Object:
    """The same of a path that is known to stand for one."""
    place = object_of(path)
    assert place is not None, path
    return place


def is_own(name: str) -> bool:
    """Whether a file of this name is this node's own, and of no object."""
    return re.fullmatch(r"\..*\.(tmp|lock|parts\.json)", name) is not None


# --- single files --------------------------------------------------------------------------------

_versions: dict[Path, Version] = {}
"""Of the files that this process has published or pulled: what it need not pull again."""


def publish(path: Path, source: Path | None = None) -> None:
    """Write the object of `path`, from the file `source`; by default from `path` itself."""
    if (place := object_of(path)) is not None:
        _versions[path] = place.bucket.put(place.key, source or path)


def create(path: Path, content: bytes) -> None:
    """Write the object of `path`, which must not exist. Raises Exists."""
    if (place := object_of(path)) is not None:
        _versions[path] = place.bucket.create(place.key, content)


def publish_folder(folder: Path, source: Path | None = None, last: str = "") -> None:
    """Every file of a folder, `last` at the end; then objects that it does not hold are removed.

    source: where the files are; by default in `folder` itself.
    """
    if (place := object_of(folder)) is None:
        return
    source = source or folder
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == last):
        publish(folder / name, source / name)
    there = [each.key for each in place.bucket.listed(f"{place.key}/")]
    place.bucket.delete(*(key for key in there if key.removeprefix(f"{place.key}/") not in names))


def remove(path: Path) -> None:
    """The object of a file."""
    if (place := object_of(path)) is not None:
        _versions.pop(path, None)
        place.bucket.delete(place.key)


def remove_folder(folder: Path, first: str = "") -> None:
    """All objects below a folder; that of the file `first` before the others."""
    if (place := object_of(folder)) is not None:
        if first:
            place.bucket.delete(f"{place.key}/{first}")
        place.bucket.delete(*(each.key for each in place.bucket.listed(f"{place.key}/")))


def copy(path: Path, target: Path) -> int:
    """The object of a path, written to a file outside of the mirror; returns its bytes. Raises Missing."""
    place = object_at(path)
    with temporary_for(target) as temporary:
        size = place.bucket.download(place.key, temporary)
        temporary.replace(target)
    return size


# --- folders -------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """Names directly below a folder of a mirror, in the bucket; [] for any other folder."""
    if (place := object_of(folder)) is None:
        return []
    folders, objects = place.bucket.children(f"{place.key}/" if place.key else "")
    return sorted({*folders, *(each.key.rpartition("/")[2] for each in objects)} - {""})


def names_below(folder: Path) -> list[str]:
    """Of all objects below a folder of a mirror, relative to it; [] for any other folder."""
    if (place := object_of(folder)) is None:
        return []
    prefix = f"{place.key}/"
    return [each.key.removeprefix(prefix) for each in place.bucket.listed(prefix)]


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of the objects directly below a folder of a mirror, by name."""
    if (place := object_of(folder)) is None:
        return {}
    _, objects = place.bucket.children(f"{place.key}/")
    return {each.key.rpartition("/")[2]: each.size for each in objects}


def size_of(path: Path) -> int | None:
    """Bytes of a path's object; None if there is none."""
    listed = place.bucket.head(place.key) if (place := object_of(path)) is not None else None
    return listed.size if listed else None


def pull(folder: Path, want: Callable[[str], bool] = lambda name: True, *, exactly: bool = False) -> None:
    """Bring the wanted files of a folder here as they are in the bucket. want: called with relative names.

    Files that the bucket does not have any more are removed: those that nobody wrote lately, since another
    process of this node may be writing them; exactly: all, for the one who alone may write.
    """
    if (place := object_of(folder)) is None:
        return
    prefix = f"{place.key}/"
    there = {each.key.removeprefix(prefix): each for each in place.bucket.listed(prefix)}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    _match(
        place.bucket, folder, {n: each for n, each in there.items() if want(n)}, filter(want, here), exactly
    )


def pull_files(folder: Path, names: Collection[str], *, exactly: bool = False) -> None:
    """The same for files directly in the folder, by name, whatever else is below it."""
    if (place := object_of(folder)) is None:
        return
    _, objects = place.bucket.children(f"{place.key}/")
    there = {each.key.rpartition("/")[2]: each for each in objects}
    here = [name for name in names if (folder / name).is_file()]
    _match(place.bucket, folder, {n: each for n, each in there.items() if n in names}, here, exactly)


def _match(
    bucket: Bucket, folder: Path, there: Mapping[str, Listed], here: Iterable[str], exactly: bool
) -> None:
    for name, each in there.items():
        _bring(bucket, each, folder / name)
    before = time.time() - (0 if exactly else GRACE_SECONDS)
    for name in set(here) - set(there):
        path = folder / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before and not is_own(path.name):
                path.unlink()
                _versions.pop(path, None)


def pull_file(path: Path) -> bool:
    """Bring one file here as it is in the bucket. Whether it is there."""
    if (place := object_of(path)) is None:
        return path.exists()
    each = place.bucket.head(place.key)
    if each is None:
        path.unlink(missing_ok=True)
        return False
    _bring(place.bucket, each, path)
    return True


def _bring(bucket: Bucket, each: Listed, path: Path) -> None:
    if path.exists() and _versions.get(path) == each.version:
        return
    with temporary_for(path) as temporary:
        try:
            bucket.download(each.key, temporary)
        except Missing:  # removed since
            return
        temporary.replace(path)
    _versions[path] = each.version


@contextlib.contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A path next to it, for a file to be renamed; removed at the end where it was not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


# --- large files that never change: the bounded cache ---------------------------------------------


def fetch(path: Path, expected: Mapping[str, Any]) -> bool:
    """Have the file here, with these bytes; once for all processes of the node. Whether it is there then.

    expected: {size, xxh3_128}. What comes otherwise than it was written is fetched once more, then left out.
    """
    place = object_of(path)
    if place is None or _has(path, expected["size"]):
        return path.exists()
    with locked(path) as lock:
        if _has(path, expected["size"]):
            return True
        for _ in range(2):
            with temporary_for(path) as temporary:
                hash_ = xxhash.xxh3_128()
                try:
                    size = place.bucket.download(place.key, temporary, hash_)
                except Missing:
                    return False
                if {"size": size, "xxh3_128": hash_.hexdigest()} == dict(expected):
                    temporary.replace(path)
                    _make_room(path, size)
                    lock.unlink(missing_ok=True)
                    return True
    return False


def _has(path: Path, size: int) -> bool:
    try:
        found = path.stat()
        if found.st_size != size:
            return False
        os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))  # it is in use
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Path]:
    """One process of this node at a time works on the file. Gives the lock's own file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield lock


_since_trim = 0


def wrote(path: Path) -> None:
    """A large file of this node was written and published: it is part of the cache from now on."""
    if split(path) is not None:
        _make_room(path, path.stat().st_size)


def _make_room(path: Path, n_bytes: int) -> None:
    global _since_trim
    _since_trim += n_bytes
    if _since_trim >= min(TRIM_BYTES, _limit_given() or TRIM_BYTES):
        _since_trim = 0
        parts = path.parts
        trim(Path(*parts[: parts.index(FOLDER) + 1]))


def _limit_given() -> int | None:
    given = os.environ.get(LIMIT_VARIABLE)
    return int(float(given)) if given else None


def trim(root: Path) -> None:
    """Remove the large files of a mirror that were not used for longest, until they fit its limit.

    A file that is mapped into memory stays readable there.
    """
    found = sorted((used, size, path) for path, size, used in _large(root))
    total = sum(size for _, size, _ in found)
    limit = _limit_given()
    if limit is None:
        limit = int(FREE_SHARE * (shutil.disk_usage(root).free + total))
    before = time.time() - GRACE_SECONDS
    for used, size, path in found:
        if total <= limit or used > before:
            return
        path.unlink(missing_ok=True)
        total -= size


def _large(root: Path) -> Iterable[tuple[Path, int, float]]:
    """Token shards and the state of checkpoints: what can be fetched again. (path, size, last used)."""
    for folder, _, names in os.walk(root):
        if os.path.basename(folder) == "shards" or "/checkpoints/step-" in folder:  # noqa: PTH119
            for name in names:
                path = Path(folder, name)
                if name.endswith((".arrow", ".safetensors")):
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield path, stat.st_size, max(stat.st_atime, stat.st_mtime)


@cache
def usable(folder: Path) -> None:
    """Raises StorageError where this node cannot have the mirror."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{uuid.uuid4().hex[:12]}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"this node cannot keep its copy of {uri_of(folder)}",
            where=str(folder),
            why=str(error),
            fix=f"set {CACHE_VARIABLE} to a folder that exists on every node, on a local disk",
        ) from error
