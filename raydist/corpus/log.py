"""The token log: the documents of one source as token ids, in Arrow files in a fixed order.

A slice of the source files becomes shards and then a commit record. The manifest, written last, makes the
token log complete. This module writes slices and reads token logs, without Ray; raydist.corpus.log_folder
has the names of the files.

Where a document came from is `file` and `row`. What `row` counts depends on the format, always from 0 and
from the start of the file, however it was cut into slices:

    text, csv, jsonl, json of lines    byte    where the record starts in the decompressed file
    parquet, arrow                     row     over all row groups or record batches
    json, an array or columns          row     of the array's elements, or of the column's values

quarantine.jsonl names it: {file, byte, reason} or {file, row, reason}; row: null is the whole file or the
rest of it. In quarantine files that raydist wrote before it did so, `row` is either, as above.

Shapes: N documents of a shard, M tokens of all its documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from raydist.bucket import mirror
from raydist.corpus.log_folder import MADE_AGAIN, LogFolder
from raydist.errors import LogError
from raydist.files import measure, replacing

FORMAT = 1
SHARD_BYTES = 128 * 2**20
"""A slice starts a new shard after this many bytes of tokens and row data, which bounds a task's memory."""
ROW_BYTES = 48
HASH_BYTES = 16

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def held_out(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Which documents are held out for evaluation: those with a hash in the lowest `share` of all hashes."""
    return np.ones(len(hashes), bool) if share >= 1 else hashes < np.uint64(math.floor(share * 2.0**64))


@dataclass(frozen=True)
class Documents:
    """N tokenized documents.

    tokens: [M].  offsets: int64 [N+1] into tokens.  hashes: uint8 [N, 16], of the UTF-8 text.  n_bytes: int64
    [N], of the UTF-8 text.  files: int32 [N] into the slice's file names.  rows: int64 [N], see above.
    """

    tokens: Tokens
    offsets: Ints
    hashes: npt.NDArray[np.uint8]
    n_bytes: Ints
    files: npt.NDArray[np.int32]
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> Documents:
        """Documents [start, stop), as views."""
        first, last, rows = self.offsets[start], self.offsets[stop], slice(start, stop)
        tokens, offsets = self.tokens[first:last], self.offsets[start : stop + 1] - first
        columns = self.hashes[rows], self.n_bytes[rows], self.files[rows], self.rows[rows]
        return Documents(tokens, offsets, *columns)

    @staticmethod
    def join(parts: Sequence[Documents]) -> Documents:
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        names = ("tokens", "hashes", "n_bytes", "files", "rows")
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Documents(offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **columns)


class SliceWriter:
    """Writes one slice: its shards as documents come in, at the end its quarantine file and commit record.

    The bytes depend on the documents alone, not on how they are split over calls. So repeated and concurrent
    attempts at one slice do no harm.
    """

    def __init__(
        self, folder: LogFolder, number: int, files: Sequence[str], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder, self.number, self._files = folder, number, files
        self._shard_bytes = shard_bytes
        self._held: list[Documents] = []
        self._held_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self.bad: list[dict[str, Any]] = []
        self._n_empty = 0

    def add(self, documents: Documents, n_empty: int = 0, bad: Sequence[dict[str, Any]] = ()) -> None:
        """n_empty: documents dropped for having no text.  bad: {file, row or byte, reason} each."""
        self._n_empty += n_empty
        self.bad += bad
        while len(documents):
            rows = np.arange(1, len(documents) + 1)
            sizes = documents.offsets[1:] * documents.tokens.itemsize + rows * ROW_BYTES
            room = self._shard_bytes - self._held_bytes
            n = min(int(np.searchsorted(sizes, room)) + 1, len(documents))
            self._held.append(documents.part(0, n))
            self._held_bytes += int(sizes[n - 1])
            documents = documents.part(n, len(documents))
            if self._held_bytes >= self._shard_bytes:
                self._flush()

    def commit(self) -> dict[str, Any]:
        """Writes the quarantine file, if there is one, and then the commit record, which it returns."""
        if self._held:
            self._flush()
        if self.bad:
            self._folder.write_quarantine(self.number, self.bad)
        record = {"shards": self._shards, "n_quarantined": len(self.bad), "n_empty": self._n_empty}
        self._folder.write_commit(self.number, record)
        return record

    def _flush(self) -> None:
        documents, self._held, self._held_bytes = Documents.join(self._held), [], 0
        name = self._folder.shard_name(self.number, len(self._shards))
        size, checksum = _write_shard(self._folder.shard(name), documents, self._files)
        self._shards.append(
            {
                "name": name,
                "n_documents": len(documents),
                "n_tokens": len(documents.tokens),
                "n_bytes": int(documents.n_bytes.sum()),
                "size": size,
                "xxh3_128": checksum,
            }
        )


class _Checksummed:
    """A file to write to, which hashes and counts the bytes."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.hash, self.size = stream, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def _write_shard(path: Path, documents: Documents, files: Sequence[str]) -> tuple[int, str]:
    """Writes one record batch, so that all tokens are one array. Returns the size in bytes and a checksum."""
    hashes = pa.py_buffer(np.ascontiguousarray(documents.hashes))
    columns = {
        "input_ids": pa.LargeListArray.from_arrays(pa.array(documents.offsets), pa.array(documents.tokens)),
        "hash": pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(documents), [None, hashes]),
        "n_bytes": pa.array(documents.n_bytes),
        "file": pa.DictionaryArray.from_arrays(pa.array(documents.files), pa.array(files, pa.string())),
        "row": pa.array(documents.rows),
    }
    batch = pa.RecordBatch.from_pydict(columns)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        target = _Checksummed(stream)
        with pa.ipc.new_file(pa.PythonFile(target, "w"), batch.schema) as writer:
            writer.write_batch(batch)
    return target.size, target.hash.hexdigest()


@dataclass(frozen=True)
class Shard:
    """An Arrow file of the token log. Methods return views of the memory-mapped file where possible.

    n_bytes: of the documents' UTF-8 text.  size: of the file, in bytes.  xxh3_128: of the file.
    """

    name: str
    path: Path
    n_documents: int
    n_tokens: int
    n_bytes: int
    size: int
    xxh3_128: str

    def batch(self) -> pa.RecordBatch:
        """All documents with the columns input_ids, hash, n_bytes, file, row."""
        self.fetch()
        try:
            with pa.memory_map(str(self.path)) as stream:
                return pa.ipc.open_file(stream).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise LogError(
                f"a shard cannot be read: {error}", where=str(self.path), fix="run `raydist prepare` again"
            ) from error

    def fetch(self) -> None:
        """Have the file on this node, where the token log is in a bucket."""
        mirror.fetch(self.path, {"size": self.size, "xxh3_128": self.xxh3_128})

    def verify(self) -> None:
        """Read the whole file. Raises LogError if its bytes are not those that the manifest promises."""
        self.fetch()
        expected = {"size": self.size, "xxh3_128": self.xxh3_128}
        actual = measure(self.path) if self.path.is_file() else None
        if actual != expected:
            found = f"{actual['size']} bytes, {actual['xxh3_128']}" if actual else "no such file"
            raise LogError(
                f"the shard {self.name} of the token log is damaged",
                where=str(self.path),
                why=f"the manifest promises {self.size} bytes, {self.xxh3_128}; found {found}",
                fix=MADE_AGAIN,
            )

    def tokens(self) -> Tokens:
        """[M], uint16 or uint32."""
        values: Tokens = self.batch().column("input_ids").values.to_numpy(zero_copy_only=True)
        return values

    def offsets(self) -> Ints:
        """int64 [N+1]: document i is tokens()[offsets[i]:offsets[i+1]]."""
        return _int64(self.batch().column("input_ids").offsets)

    def lengths(self) -> Ints:
        """int64 [N], tokens of each document, without EOS."""
        return np.diff(self.offsets())

    def byte_counts(self) -> Ints:
        """int64 [N], bytes of each document's cleaned UTF-8 text."""
        return _int64(self.batch().column("n_bytes"))

    def hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [N], the first 8 bytes of each document's hash, big endian."""
        return self.hash_halves()[0]

    def hash_halves(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """uint64 [N] twice: the first and the last 8 bytes of each document's hash, big endian."""
        buffer = self.batch().column("hash").buffers()[1]
        words = np.frombuffer(buffer, ">u8", 2 * self.n_documents)
        return words[::2].astype(np.uint64), words[1::2].astype(np.uint64)


def _int64(array: pa.Array) -> Ints:
    values: Ints = array.to_numpy(zero_copy_only=True)
    return values


class Document(TypedDict):
    """A document as it is read again. input_ids: [its tokens].  hash: 16 bytes, of its UTF-8 text."""

    input_ids: Tokens
    hash: bytes
    n_bytes: int
    file: str
    row: int


@dataclass(frozen=True)
class TokenLog:
    """shards: in planned order, which is the order of the documents.  n_bytes: of their UTF-8 text.

    complete: False while the token log is being made; then `shards` are its first ones.
    left_out: what the source's folders and globs hold and the source does not use, see files.LeftOut.
    """

    path: Path
    fingerprint: str
    dtype: np.dtype[Any]
    vocab_size: int
    eos_token_id: int | None
    tokenizer: str
    shards: tuple[Shard, ...]
    n_documents: int
    n_tokens: int
    n_bytes: int
    n_quarantined: int
    n_empty: int
    complete: bool = True
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> LogFolder:
        return LogFolder(self.path)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Documents from number `start` on."""
        for shard in self.shards:
            if start < shard.n_documents:
                batch = shard.batch().slice(start)
                rest = batch.select(["hash", "n_bytes", "file", "row"]).to_struct_array()
                for tokens, row in zip(batch.column("input_ids"), rest, strict=True):
                    yield cast(Document, {"input_ids": tokens.values.to_numpy(), **row.as_py()})
            start = max(start - shard.n_documents, 0)


def open_log(path: str | Path, *, growing: bool = False) -> TokenLog:
    """The token log in folder `path`; LogError if it is incomplete, damaged or a shard is cut short.

    growing: accept one that is still being made. The content of shards is not read, see `Shard.verify`.
    """
    path = Path(path)
    folder = LogFolder(path)
    manifest = _read_begun(folder) if growing and not folder.complete() else _read_manifest(folder)
    try:
        for shard in manifest["shards"]:
            if not folder.has_shard(shard):
                raise LogError(
                    f"a shard of the token log is missing or torn: {shard['name']}",
                    where=str(folder.shard(shard["name"])),
                    why=f"the manifest promises {shard['size']} bytes",
                    fix=MADE_AGAIN,
                )
        shards = tuple(Shard(path=folder.shard(shard["name"]), **shard) for shard in manifest["shards"])
        same = {key: value for key, value in manifest.items() if key not in ("format", "dtype", "shards")}
        return TokenLog(path=path, dtype=np.dtype(manifest["dtype"]), shards=shards, **same)
    except (KeyError, TypeError) as error:
        raise LogError(
            f"{folder.manifest_file.name} is damaged",
            where=str(folder.manifest_file),
            why=f"it does not hold what raydist writes there: {error}",
            fix=MADE_AGAIN,
        ) from error


def _read_begun(folder: LogFolder) -> dict[str, Any]:
    """A manifest of the slices that are committed, up to the first one that is not."""
    head = folder.read_plan().get("log")
    if head is None:
        where = str(folder.path)
        raise LogError("the token log has no plan yet", where=where, fix="run `raydist prepare` on its job")
    records: list[dict[str, Any]] = []
    while (record := folder.read_commit(len(records))) is not None:
        records.append(record)
    return {**head, **gathered(records), "complete": False}


def gathered(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of a manifest that these commit records give: the shards in planned order, and sums."""
    shards = [shard for record in records for shard in record["shards"]]
    sums = {key: sum(shard[key] for shard in shards) for key in ("n_documents", "n_tokens", "n_bytes")}
    sums |= {key: sum(record[key] for record in records) for key in ("n_quarantined", "n_empty")}
    return {**sums, "shards": shards}


def _read_manifest(folder: LogFolder) -> dict[str, Any]:
    where, file = str(folder.path), folder.manifest_file
    try:
        manifest = folder.read_manifest()
    except FileNotFoundError:
        unfinished = f"it has no {file.name} yet; {len(folder.committed())} slices are done"
        why = unfinished if folder.path.is_dir() else "there is no such folder"
        fix = "run `raydist prepare` on the job that makes it: only missing slices are made"
        raise LogError("the token log is not complete", where=where, why=why, fix=fix) from None
    if manifest.get("format") != FORMAT:
        raise LogError(
            f"the token log has format {manifest.get('format')!r}, this version reads {FORMAT}",
            where=where,
            fix="delete the folder and run `raydist prepare` again",
        )
    return manifest
