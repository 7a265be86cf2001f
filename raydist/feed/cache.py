"""Arrays that are computed once from token logs and kept next to them, in <storage>/.packs.

The token logs themselves are never touched: they are the same whoever trains on them. Everything in .packs
can be deleted: it is made again when it is missing or damaged.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from raydist.bucket import mirror
from raydist.corpus.log import Ints, Shard, TokenLog
from raydist.files import replacing
from raydist.storage import Storage


def pack_index_folder(log: TokenLog) -> Path:
    """Next to the token logs' own folder, which holds token logs and nothing else."""
    return Storage.of_log(log.path).pack_indexes


def cached_array(path: Path, make: Callable[[], Ints]) -> Ints:
    """The flat array that `make` returns; kept in `path` with a checksum, and memory-mapped from there.

    Where the storage refuses writing, such as a folder shared read-only, the array is made each time.
    """
    kept = _read(path)
    if kept is not None:
        return kept
    made = np.ascontiguousarray(make(), "<i8")
    try:
        with replacing(path) as temporary:
            np.concatenate([_checksum(made), made]).tofile(temporary)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return made


def verified(shard: Shard) -> Shard:
    """The same shard, once its bytes were compared with what the manifest promises. Raises LogError.

    For what is kept: an array that was computed from a damaged shard would outlive it.
    """
    shard.fetch()
    _verify(shard, shard.path.stat().st_mtime_ns if shard.path.exists() else 0)
    return shard


@functools.cache
def _verify(shard: Shard, time_ns: int) -> None:
    """Once a process for a file that was written at time_ns."""
    shard.verify()


def is_intact(path: Path) -> bool:
    """Whether a kept array is what was written."""
    return _read(path) is not None


def _read(path: Path) -> Ints | None:
    """None if there is no such file, or if its content is not what was written."""
    if not path.exists():
        mirror.pull_file(path)
    try:
        flat = np.asarray(np.memmap(path, "<i8", mode="r"))
    except (FileNotFoundError, ValueError):  # ValueError: a file cut short, not whole numbers
        return None
    return flat[1:] if np.array_equal(flat[:1], _checksum(flat[1:])) else None


def _checksum(flat: Ints) -> Ints:
    return np.array([xxhash.xxh3_64_intdigest(flat.data)], np.uint64).view(np.int64)
