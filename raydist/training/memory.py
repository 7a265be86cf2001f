"""Errors that mean out of memory, so that smaller micro batches can be tried; and how much a process took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from raydist.training.room import Room

NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_watched(room: Room) -> Iterator[None]:
    """Raises OutOfMemory where torch or Python could not allocate, on a GPU or in host memory.

    The work since the last checkpoint is lost. Going on in the same process would not be safe: under a
    strategy that shards, the other ranks wait for this one within their own passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise room.out_of_memory(error) from error


def ran_out(error: Exception) -> bool:
    """Of memory. torch's CPU allocator and CUDA's libraries raise plain RuntimeErrors."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in NO_MEMORY)


def available_memory() -> int:
    """Bytes that processes of this host, or of this container where it has a limit, can still take."""
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, int(limit) - used + int(counts["inactive_file"]))  # that is cache
    except (OSError, ValueError, KeyError):
        return free


def peak_resident() -> int:
    """Bytes of this process at most since it began. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
