"""Recognizes errors that mean out of memory, so that smaller micro batches can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raydist.errors import OutOfMemory, first_line

FIX = (
    "train.micro_batch_size: auto finds one that fits; else take a smaller block size,"
    " gradient_checkpointing, an adapter on a quantized base, or a strategy that shards"
)

NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_watched(micro_batches: str) -> Iterator[None]:
    """Raises OutOfMemory where torch or Python could not allocate, on a GPU or in host memory.

    The work since the last checkpoint is lost. Going on in the same process would not be safe: under a
    strategy that shards, the other ranks wait for this one within their own passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        raise out_of_memory(f"with micro batches of {micro_batches} sequences", error) from error


def out_of_memory(what: str, cause: Exception) -> OutOfMemory:
    return OutOfMemory(f"out of memory {what}", why=first_line(cause), fix=FIX)


def _ran_out(error: Exception) -> bool:
    """torch's CPU allocator and CUDA's libraries raise plain RuntimeErrors."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in NO_MEMORY)
