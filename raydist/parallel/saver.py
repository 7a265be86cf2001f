"""Writes this rank's file of a checkpoint: at once, or behind training from a copy in host memory.

    save ─▶ copy: the weights may change once `settle` returns ─▶ a thread writes, hashes, flushes ─▶ handle

The copy's memory is laid out as the file is, kept for the next save, and pinned where there is a GPU. The
thread speaks to no other rank, and makes a few calls for each 16 MiB, in which Python's lock is free.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from raydist import files
from raydist.background import in_background
from raydist.bucket import mirror
from raydist.parallel.share import Piece, file_name, header
from raydist.parallel.world import World

CHUNK_BYTES, PAGE_BYTES = 2**24, 4096
PORTABLE = 1
"""Of CUDA: memory pinned for every context of this process."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes, for numpy, which has no bfloat16."""

Files = dict[str, dict[str, Any]]


class Written:
    """The handle of what was written before `save` returned. files: {name: {size, xxh3_128}}."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def done(self, within: float = 0.0) -> bool:
        return True


class Behind:
    """The handle of what a thread writes."""

    def __init__(self, outcome: Future[Files]) -> None:
        self._outcome = outcome

    @property
    def files(self) -> Files:
        return self._outcome.result()

    def done(self, within: float = 0.0) -> bool:
        if not wait([self._outcome], within).done:
            return False
        self._outcome.result()
        return True


class Saver:
    """Of one rank. One save at a time: the next one takes the memory of the last."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._buffer: Tensor | None = None
        self._reserving: Future[Tensor] | None = None
        self._settle: Callable[[], object] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._closed = threading.Event()

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Take the memory for copies of these in a thread, so that no save waits for its page faults."""
        n_bytes = _n_bytes(pieces)
        if self._reserving is None and (self._buffer is None or len(self._buffer) < n_bytes):
            self._reserving = in_background(lambda: self._memory(n_bytes), "raydist-reserve")

    def save(
        self,
        folder: Path,
        pieces: Sequence[Piece],
        tensors: Iterable[Tensor],
        more: Mapping[str, bytes],
        *,
        behind: bool,
        lasting: bool,
    ) -> Written | Behind:
        """Begin this rank's file, and those in `more`, in the folder. tensors: of the pieces, in their order.

        behind: write in a thread.  lasting: the tensors are there unchanged until `settle` is called; else
        each is read before the next one is asked for.
        """
        begin = header(pieces)
        contents: dict[str, Iterable[Any]] = {name: [content] for name, content in more.items()}
        if pieces:
            contents[file_name(self.world.rank)] = itertools.chain([begin], map(_bytes, tensors))
        elif not behind:
            deque(tensors, maxlen=0)  # the other ranks gather theirs with this one
        # opened here: a thread that outlives its attempt cannot write into what the next attempt makes
        streams = {name: _create(folder / name) for name in contents}
        if not behind:
            return Written(self._write(folder, streams, contents))
        buffer = self._room(_n_bytes(pieces))
        copied = self._copy(_views(buffer, pieces), tensors, lasting=lasting)
        if pieces:
            contents[file_name(self.world.rank)] = [begin, _bytes(buffer)]

        def work() -> Files:
            with self._on_device():
                copied()
                return self._write(folder, streams, contents)

        return Behind(in_background(work, "raydist-save"))

    def settle(self) -> None:
        """Returns once what a save reads may change: on a GPU for what is computed from now on."""
        if self._settle is not None:
            self._settle()
            self._settle = None

    def close(self) -> None:
        """What is being written is left unfinished."""
        self._closed.set()

    # --- the copy ----------------------------------------------------------------------------------

    def _room(self, n_bytes: int) -> Tensor:
        if self._reserving is not None:
            self._buffer, self._reserving = self._reserving.result(), None
        if self._buffer is None or len(self._buffer) < n_bytes:
            self._buffer = None  # first, so that both are not there at once
            self._buffer = self._memory(n_bytes)
        return self._buffer[:n_bytes]

    def _memory(self, n_bytes: int) -> Tensor:
        """Each page is touched; pinned where there is a GPU, if the driver allows it."""
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        buffer.numpy()[::PAGE_BYTES] = 0
        if self._on_gpu and n_bytes:
            with self._on_device():
                cuda, address = torch.cuda.cudart(), buffer.data_ptr()
                # torch's own allocator would round up to a power of two
                if int(cuda.cudaHostRegister(address, n_bytes, PORTABLE)) == 0:
                    weakref.finalize(buffer, cuda.cudaHostUnregister, address)
        return buffer

    def _copy(
        self, views: Sequence[Tensor], tensors: Iterable[Tensor], *, lasting: bool
    ) -> Callable[[], object]:
        """Begin to copy; what is returned, for the thread to call, ends when all is copied."""
        if self._on_gpu:
            return self._copy_from_gpu(views, tensors)
        if not lasting:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
            return lambda: None
        copied, sources = threading.Event(), list(tensors)
        self._settle = copied.wait

        def copy() -> None:
            try:
                for view, tensor in zip(views, sources, strict=True):
                    np.copyto(_bits(view), _bits(tensor))  # in this thread alone, unlike torch's
            finally:
                copied.set()

        return copy

    def _copy_from_gpu(self, views: Sequence[Tensor], tensors: Iterable[Tensor]) -> Callable[[], object]:
        device = self.world.device
        self._stream = self._stream or torch.cuda.Stream(device)
        for view, tensor in zip(views, tensors, strict=True):
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                view.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                tensor.record_stream(self._stream)  # its memory is not given to another before
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._stream)
        self._settle = lambda: torch.cuda.current_stream(device).wait_event(copied)
        return copied.synchronize

    @property
    def _on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """A thread begins on the first GPU, which may be another rank's."""
        return torch.cuda.device(self.world.device) if self._on_gpu else contextlib.nullcontext()

    # --- the files ---------------------------------------------------------------------------------

    def _write(
        self, folder: Path, streams: Mapping[str, FileIO], contents: Mapping[str, Iterable[Any]]
    ) -> Files:
        written = {name: self._write_file(streams[name], parts) for name, parts in contents.items()}
        files.flush_to_disk(folder)
        for name in written:
            mirror.publish(folder / name)
        return written

    def _write_file(self, stream: FileIO, parts: Iterable[Any]) -> dict[str, Any]:
        """Size and checksum, as `files.measure` gives them, of what is on disk then."""
        digest, size = xxhash.xxh3_128(), 0
        try:
            with stream:
                for part in parts:
                    for start in range(0, len(part), CHUNK_BYTES):
                        if self._closed.is_set():
                            raise RuntimeError("the attempt has ended")
                        rest = memoryview(part)[start : start + CHUNK_BYTES]
                        digest.update(rest)
                        size += len(rest)
                        while rest:
                            rest = rest[stream.write(rest) :]
                os.fsync(stream.fileno())
        except OSError as error:
            error.filename = error.filename or str(stream.name)
            raise
        return {"size": size, "xxh3_128": digest.hexdigest()}


def _n_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.n_bytes for piece in pieces)


def _create(path: Path) -> FileIO:
    stream = path.open("xb", buffering=0)
    files.like_its_folder(path)
    return stream


def _views(buffer: Tensor, pieces: Iterable[Piece]) -> list[Tensor]:
    """The places of the pieces, one after another."""
    views, at = [], 0
    for piece in pieces:
        part = buffer[at : at + piece.n_bytes]
        views.append(part.view(piece.dtype).view(piece.shape))
        at += piece.n_bytes
    return views


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().view(BITS[tensor.dtype.itemsize]).numpy()


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
