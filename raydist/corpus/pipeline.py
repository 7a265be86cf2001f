"""The Ray Data pipeline of a token log: read a slice -> clean and tokenize -> write its shards.

Ray fuses the three into one task per slice, so that text and tokens never travel through the object
store. A task may run twice, also at the same time: both attempts write the same bytes.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import orjson
import pandas as pd
import ray.data
import xxhash
from ray.data import Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink
from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

from raydist.corpus.clean import Cleaner, make_cleaner
from raydist.corpus.files import unchanged
from raydist.corpus.formats import Bad, Item, ReadOptions, Record, Unit
from raydist.corpus.locations import File
from raydist.corpus.log import HASH_BYTES, Documents, SliceWriter
from raydist.corpus.log_folder import LogFolder
from raydist.corpus.slices import Slice, read_slice
from raydist.corpus.source import SourceFiles, cleaned
from raydist.corpus.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer
from raydist.errors import BadRecords, ClusterLost, CorpusError, LogError, RaydistError
from raydist.files import storage_error
from raydist.job.functions import find_in, module_folders
from raydist.own_ray import ended_part

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import TaskContext

BLOCK_BYTES = 4 * 2**20
"""Text that is tokenized at once: it fits the caches, and the cost per call does not matter."""
MAX_RETRIES = 8
"""Of a task whose process or machine was lost. Ray Data's own number has no end, and so has a crash of its
own making. Ray counts those that it kills for memory apart, without end."""
BAD_SHOWN = 5
"""Unreadable records that an error names."""


@dataclass(frozen=True)
class Share:
    """The part of a cluster that tasks may use. nodes: Ray's ids; if empty, any node."""

    cpus: float = math.inf
    nodes: tuple[str, ...] = ()


WHOLE_CLUSTER = Share()


REMOTE = {"max_retries": MAX_RETRIES}
"""Of all three steps alike: Ray Data fuses no steps with different ones."""


class SliceDatasource(Datasource):
    """One read task per slice. slices: those that are missing from the token log, by number."""

    def __init__(self, source: SourceFiles, slices: Mapping[int, Slice]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source, self._slices = source, slices

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        files, options = self._source.files, self._source.options
        readers = (
            _Reader(number, *narrowed(files, slice_), options) for number, slice_ in self._slices.items()
        )
        return [ReadTask(reader, metadata) for reader in readers]


class _Reader:
    """Calls `read_blocks`. What it is given is kept small: the names of a slice's files may be megabytes."""

    __name__ = "read_blocks"  # Ray names it where it finds it large

    def __init__(self, *given: Any) -> None:
        self._given = zlib.compress(pickle.dumps(given), 1)

    def __call__(self) -> Iterator[pd.DataFrame]:
        return read_blocks(*pickle.loads(zlib.decompress(self._given)))  # noqa: S301 - its own


def narrowed(files: Sequence[File], slice_: Slice) -> tuple[tuple[File, ...], Slice]:
    """The files that `slice_` reads, and the slice with the indexes of its parts' files among these."""
    used = sorted({part.file for part in slice_.parts})
    index = {file: i for i, file in enumerate(used)}
    parts = tuple(replace(part, file=index[part.file]) for part in slice_.parts)
    return tuple(files[i] for i in used), replace(slice_, parts=parts)


class Chunk:
    """Records of a slice on their way from the reader to the tokenizer: the only value in a row of a block.

    It is a Python object, so that text is not copied into Arrow and back between two steps of one task.
    items: (index into `files`, record) in order. An empty chunk ends the slice.
    """

    def __init__(self, number: int, files: Sequence[str], items: Sequence[tuple[int, Item]]) -> None:
        self.number, self.files, self.items = number, files, items

    def __sizeof__(self) -> int:
        """Ray ends a block by this size. Not the real one: each chunk with text is to fill a block."""
        return BLOCK_BYTES if self.items else 256


def read_blocks(
    number: int, files: Sequence[File], slice_: Slice, options: ReadOptions
) -> Iterator[pd.DataFrame]:
    """A frame per chunk of a few MiB of text, then one with the empty chunk that ends the slice.

    Raises CorpusError in place of the end if one of the files changed, so that the slice is not committed.
    """
    names = [file.name for file in files]
    with unchanged(files):
        for items in read_slice(files, slice_, options):
            if items:
                yield _frame("chunk", [Chunk(number, names, items)])
    yield _frame("chunk", [Chunk(number, names, [])])


def _frame(name: str, objects: Sequence[Any]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(list(objects), dtype=object)})


@dataclass(eq=False)
class Piece:
    """Part of a slice on its way from the tokenizer to the sink: the only value in a row of a block.

    It is a Python object, so that the sink can empty it. Ray keeps a write task's blocks until the task ends,
    and a file that cannot be split may hold more tokens than fit in memory.
    """

    number: int
    files: Sequence[str]
    documents: Documents | None
    bad: Sequence[dict[str, Any]]
    n_empty: int
    last: bool

    def take(self) -> Documents:
        documents, self.documents = self.documents, None
        assert documents is not None, "a piece is written once"
        return documents

    def __sizeof__(self) -> int:
        """In bytes; Ray ends a block by this size."""
        return 256 + (self.documents.tokens.nbytes if self.documents is not None else 0)


def tokenize(
    frame: pd.DataFrame, spec: TokenizerSpec, backend: str, clean: tuple[Any, ...], modules: dict[str, str]
) -> pd.DataFrame:
    """Cleans, hashes and encodes the chunks; gives a Piece for each.

    modules: folders of the modules that `clean` names, by `module_folders`.
    """
    find_in(modules)
    tools = _tokenizer(spec, backend), _cleaner(orjson.dumps(clean)) if clean else None
    return _frame("piece", [_piece(chunk, *tools) for chunk in frame["chunk"]])


def _piece(chunk: Chunk, tokenizer: Tokenizer, clean: Cleaner | None) -> Piece:
    records = [(file, item) for file, item in chunk.items if isinstance(item, Record)]
    texts = [cleaned(clean, record, chunk.files[file]) if clean else record.text for file, record in records]
    kept = [record for record, text in zip(records, texts, strict=True) if text]
    documents = _documents(tokenizer, [text for text in texts if text], kept)
    bad = [
        {"file": chunk.files[file], item.unit: item.row, "reason": item.reason}
        for file, item in chunk.items
        if isinstance(item, Bad)
    ]
    return Piece(chunk.number, chunk.files, documents, bad, len(records) - len(kept), not chunk.items)


def _documents(tokenizer: Tokenizer, texts: list[str], records: list[tuple[int, Record]]) -> Documents:
    """records: for each text, the index of its file, and the record that it comes from."""
    encoded = [text.encode() for text in texts]
    hashes = b"".join(map(xxhash.xxh3_128_digest, encoded))
    tokens, offsets = tokenizer.encode_batch(texts)
    return Documents(
        tokens,
        offsets,
        np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES),
        np.fromiter(map(len, encoded), np.int64, len(encoded)),
        np.fromiter((file for file, _ in records), np.int32, len(records)),
        np.fromiter((record.row for _, record in records), np.int64, len(records)),
    )


@functools.lru_cache(maxsize=2)
def _tokenizer(spec: TokenizerSpec, backend: str) -> Tokenizer:
    """Kept for the life of the worker process. A task has one CPU, so the libraries get one thread."""
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    return load_tokenizer(spec, backend)


@functools.lru_cache(maxsize=2)
def _cleaner(steps: bytes) -> Cleaner:
    return make_cleaner(orjson.loads(steps))


class LogDatasink(Datasink[None]):
    """Writes each slice's shards and, last, its commit record.

    fail_on_bad: raise BadRecords once a slice with unreadable records is committed.
    """

    def __init__(self, folder: LogFolder, fail_on_bad: bool) -> None:
        self.folder, self._fail_on_bad = folder, fail_on_bad

    def write(self, blocks: Iterable[pd.DataFrame], ctx: TaskContext) -> None:
        writer: SliceWriter | None = None
        for block in blocks:
            for piece in block["piece"]:
                writer = writer or SliceWriter(self.folder, piece.number, piece.files)
                writer.add(piece.take(), piece.n_empty, piece.bad)
                if piece.last:
                    self._commit(writer)
                    writer = None
        if writer is not None:
            raise LogError(
                f"slice {writer.number} ended before its reader did",
                where=str(self.folder.path),
                why="its read, tokenize and write steps did not run as one task",
                fix="report it: this is a fault of raydist or of this version of Ray. Nothing was committed",
            )

    def _commit(self, writer: SliceWriter) -> None:
        writer.commit()
        if writer.bad and self._fail_on_bad:
            raise bad_records(writer.bad[:BAD_SHOWN], len(writer.bad), self.folder)


def bad_records(first: Sequence[dict[str, Any]], n_bad: int, folder: LogFolder) -> BadRecords:
    shown = "; ".join(f"{bad['file']}{_place(bad)}: {bad['reason']}" for bad in first)
    return BadRecords(
        f"{n_bad} record{'s' * (n_bad != 1)} or files cannot be read",
        where=shown + ("; ..." if n_bad > len(first) else ""),
        why="corpus.on_error is fail, so nothing is trained on a part of the text; those found so far are "
        f"listed in {folder.quarantine}",
        fix="fix them, or set corpus.on_error: quarantine to leave them out",
    )


def _place(bad: Mapping[str, Any]) -> str:
    """Where in the file: a row or a byte, from 0. Nowhere, if the file as a whole or its rest is lost."""
    places = (f", {unit} {bad[unit]}" for unit in get_args(Unit) if bad.get(unit) is not None)
    return next(places, "")


def write_slices(
    source: SourceFiles,
    slices: Mapping[int, Slice],
    spec: TokenizerSpec,
    backend: str,
    sink: LogDatasink,
    share: Share,
) -> None:
    """Make `slices` (by number) on Ray. Raises the RaydistError that a task raised, without its wrapping."""
    with settings(share):
        try:
            dataset(source, slices, spec, backend).write_datasink(sink, ray_remote_args=REMOTE)
        except Exception as error:
            raise _unwrapped(error, sink.folder) from error


@contextmanager
def settings(share: Share = WHOLE_CLUSTER) -> Iterator[None]:
    """Ray Data's context for this pipeline. It does not log errors, because they are raised."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.batch_to_block_arrow_format = False  # else each Piece would be pickled into Arrow
    context.enable_tensor_extension_casting = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # There is only one operator. Reserving resources for others left all CPUs but one idle for a second.
    context.op_resource_reservation_enabled = False
    context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=share.cpus)
    if share.nodes:
        context.execution_options.label_selector = {"ray.io/node-id": f"in({','.join(share.nodes)})"}
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, EndsWithRay]
    context.execution_no_progress_timeout_s = -1  # a slice of a file that cannot be split may take hours
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


class EndsWithRay(ExecutionCallback):
    """Ends Ray Data's own thread where Ray is gone: left alone it tries on, and Ray then ends the process."""

    def on_execution_step(self, executor: Any) -> None:
        if ended := ended_part():
            raise ClusterLost(ended)


def dataset(
    source: SourceFiles, slices: Mapping[int, Slice], spec: TokenizerSpec, backend: str
) -> ray.data.Dataset:
    """The pipeline without the sink. With fewer blocks than slices Ray would split them, and fuse nothing."""
    datasource = SliceDatasource(source, slices)
    functions = [step for step in source.clean if isinstance(step, str) and ":" in step]
    tools = {"spec": spec, "backend": backend, "clean": source.clean, "modules": module_folders(functions)}
    with (
        warnings.catch_warnings()
    ):  # Ray is to have a name for each of them, but has none for max_retries yet
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        read = ray.data.read_datasource(datasource, override_num_blocks=len(slices), ray_remote_args=REMOTE)
        tokenized: ray.data.Dataset = read.map_batches(
            tokenize, fn_kwargs=tools, batch_size=None, batch_format="pandas", **REMOTE
        )
    return tokenized


def _unwrapped(error: BaseException, folder: LogFolder) -> RaydistError:
    """The RaydistError that caused `error`; for what a disk refused, a StorageError; else a CorpusError."""
    chain = [error]
    while (cause := getattr(chain[-1], "cause", None) or chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, RaydistError) and not isinstance(link, RayTaskError):
            return link
    if refused := storage_error(error, folder.path):
        return refused
    if any(isinstance(link, WorkerCrashedError | NodeDiedError) for link in chain):
        return CorpusError(
            f"a preparation task lost its process {MAX_RETRIES + 1} times",
            where=str(folder.path),
            why="as a rule a cleaning step, or a library that it calls, crashes on one of the documents;"
            " parquet and Arrow files are decoded in another process, and cannot be the cause",
            fix="find the step that crashes, then run again: finished slices are kept",
        )
    return CorpusError(
        f"a preparation task failed: {type(chain[-1]).__name__}: {chain[-1]}",
        where=str(folder.path),
        why=re.sub(r"\x1b\[\d+m", "", str(error)),
        fix="remove the cause and run it again: finished slices are kept",
    )
