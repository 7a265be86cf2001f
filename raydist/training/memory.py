"""Recognizes errors that mean out of memory, so that smaller micro batches can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
