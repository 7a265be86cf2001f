"""Parquet and Arrow: only the text column is read, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydist.corpus.formats.reader import Cut, Reader, cut_units
from raydist.corpus.formats.records import (
    CHUNK_BYTES,
    Bad,
    Item,
    Part,
    ReadOptions,
    Record,
    Torn,
    decoded,
    no_column,
    same_name,
)
from raydist.corpus.formats.streams import Opened

DAMAGED = (pa.ArrowException, OSError, ValueError)
MAX_ROWS = 65536


def _open_parquet(stream: Opened) -> Any:
    """Raises one of DAMAGED if the file is not parquet, or damaged."""
    source = pa.PythonFile(cast(IO[bytes], stream), mode="r")
    return pq.ParquetFile(source, buffer_size=CHUNK_BYTES, page_checksum_verification=True)


def _open_arrow(stream: Opened, fields: list[int] | None = None) -> Any:
    """A reader of an IPC file (which has num_record_batches) or stream. `fields`: the columns to read."""
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    start = stream.read(6)
    stream.seek(0)
    source = pa.PythonFile(cast(IO[bytes], stream), mode="r")
    return (pa.ipc.open_file if start == b"ARROW1" else pa.ipc.open_stream)(source, options=options)


def _is_file(reader: Any) -> bool:
    return isinstance(reader, pa.ipc.RecordBatchFileReader)


def _find(schema: Any, column: str) -> list[str] | Bad:
    """The path of `column`: its own name, or the structs that its dots enter. Bad: none, or several."""
    fields, path = list(schema), [column] if column in schema.names else column.split(".")
    for name in path:
        names = [field.name for field in fields]
        if name not in names:
            return no_column(column, schema.names)
        if names.count(name) > 1:
            return same_name(name, names)
        kind = fields[names.index(name)].type
        fields = list(kind) if pa.types.is_struct(kind) else []
    return path


def _read_parquet(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """Part: row groups. A damaged one is one Bad; the others are read."""
    try:
        file = _open_parquet(stream)
    except DAMAGED as error:
        yield [Bad(None, f"not a readable parquet file: {error}")]
        return
    path = _find(file.schema_arrow, options.text_column)
    if isinstance(path, Bad):
        yield [path]
        return
    held, said = sum(_rows(file, group) for group in range(file.num_row_groups)), file.metadata.num_rows
    if part.start == 0 and held != said:
        yield [Bad(None, f"its row groups hold {held} rows, and the file says {said}")]
    row = 0
    for group in range(file.num_row_groups):
        n_rows = _rows(file, group)
        column = _column(file, group, path)
        if part.is_whole or part.start <= group < part.end:
            rows = max(1, min(MAX_ROWS, CHUNK_BYTES * n_rows // max(1, column.total_uncompressed_size)))
            batches = file.iter_batches(rows, [group], [".".join(path)], use_threads=False)
            # its rows and the column's values are equally many: a value that is null counts as one
            yield from _items_of(batches, path, row, f"row group {group}", max(n_rows, column.num_values))
        row += n_rows


def _rows(file: Any, group: int) -> int:
    """What the footer says."""
    return int(file.metadata.row_group(group).num_rows)


def _column(file: Any, group: int, path: list[str]) -> Any:
    """What the footer says of the column in a row group."""
    meta, name = file.metadata.row_group(group), ".".join(path)
    columns = (meta.column(i) for i in range(meta.num_columns))
    return next(column for column in columns if f"{column.path_in_schema}.".startswith(f"{name}."))


def _read_arrow(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """Part: record batches of an IPC file; a stream is read as a whole."""
    try:
        schema = _open_arrow(stream).schema
        path = _find(schema, options.text_column)
        if isinstance(path, Bad):
            yield [path]
            return
        stream.seek(0)
        reader = _open_arrow(stream, [schema.get_all_field_indices(path[0])[0]])
        if not _is_file(reader):
            batches, row = _to_its_end(reader, stream), 0
        else:
            end = reader.num_record_batches if part.is_whole else part.end
            row = sum(reader.get_batch(i).num_rows for i in range(part.start))
            batches = (reader.get_batch(i) for i in range(part.start, end))
    except DAMAGED as error:
        yield [Bad(None, f"not a readable Arrow file: {error}")]
        return
    what = f"the rest of record batches {part.start} to {part.end - 1}"
    yield from _items_of(batches, path, row, "the rest of the file" if part.is_whole else what, validate=True)


def _to_its_end(reader: Any, stream: Opened) -> Iterator[Any]:
    """The batches of an IPC stream. Torn: it lacks its end mark, or more follows that mark.

    The reader stops without an error at the file's end, which may be where the file was cut.
    """
    n_rows = 0
    for batch in reader:
        yield batch
        n_rows += batch.num_rows
    if stream.at_end:
        raise Torn(f"the stream ends after {n_rows} rows without its end mark: it was cut, or never closed")
    if stream.read(CHUNK_BYTES).strip(b"\0"):
        raise Torn(f"more follows the stream's end mark, after {n_rows} rows: only one stream is read")


def _items_of(
    batches: Iterator[Any], path: list[str], row: int, what: str, n_rows: int = -1, *, validate: bool = False
) -> Iterator[list[Item]]:
    """Items of each batch. The first that cannot be read is one Bad, and the end.

    what: the part of the file that is lost with it. n_rows: that it says it has, -1 if it says nothing.
    validate: check lengths, offsets and indices, which a damaged file may have wrong.
    """
    first = row
    try:
        for batch in batches:
            if validate:
                batch.validate()
            array = batch.column(batch.schema.get_all_field_indices(path[0])[0])
            for name in path[1:]:
                array = pc.struct_field(array, [name])
            if not _is_text(array.type):
                yield [Bad(None, f"{'.'.join(path)} is {_kind(array.type)}, not a string")]
                return
            if validate:
                _check(array)
            for piece in _pieces(_plain(array)):
                yield _items(piece, row, path)
                row += len(piece)
        if n_rows not in (-1, row - first):
            yield [Bad(None, f"{what} holds {row - first} rows of {'.'.join(path)}, and says {n_rows}")]
    except MemoryError:
        raise
    except DAMAGED as error:
        yield [Bad(None, f"{what} is damaged: {error}")]


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _kind(kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return "binary" if binary or pa.types.is_fixed_size_binary(kind) else str(kind)


def _check(array: Any) -> None:
    """Raises ArrowInvalid if offsets, views or indices lead outside of the array's data."""
    if isinstance(array, pa.DictionaryArray):
        _check(array.dictionary)
        array = pa.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary), safe=False)
    else:
        array = _as_bytes(array)  # whether it is UTF-8 is a matter of each record
    array.validate(full=True)


def _plain(array: Any) -> Any:
    """The same text without dictionary or views."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


def _pieces(array: Any) -> Iterator[Any]:
    rows = max(1, len(array) * CHUNK_BYTES // max(1, array.nbytes))
    return (array.slice(start, rows) for start in range(0, len(array), rows))


def _as_bytes(array: Any) -> Any:
    if pa.types.is_string_view(array.type):
        return array.view(pa.binary_view())
    return array.view(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary())


def _items(array: Any, first: int, path: list[str]) -> list[Item]:
    rows = range(first, first + len(array))
    try:
        values = array.to_numpy(zero_copy_only=False).tolist()
    except pa.ArrowException:
        return [_decoded(raw, row, path) for raw, row in zip(_as_bytes(array).to_pylist(), rows, strict=True)]
    if array.null_count == 0:
        return list(map(Record._make, zip(values, rows, strict=True)))
    return [_decoded(value, row, path) for value, row in zip(values, rows, strict=True)]


def _decoded(value: str | bytes | None, row: int, path: list[str]) -> Item:
    if value is None:
        return Bad(row, f"{'.'.join(path)} is null")
    return Record(value, row) if isinstance(value, str) else decoded(value, row, Record)


# --- splitting


def _cut_parquet(stream: Opened, n_bytes: int, _: ReadOptions) -> list[Cut]:
    try:
        meta = _open_parquet(stream).metadata
        sizes = [meta.row_group(group).total_byte_size for group in range(meta.num_row_groups)]
    except DAMAGED:
        return []
    return cut_units([size * stream.file.size / max(1, sum(sizes)) for size in sizes], n_bytes)


def _cut_arrow(stream: Opened, n_bytes: int, _: ReadOptions) -> list[Cut]:
    n_batches = _count_batches(stream)
    return cut_units([stream.file.size / n_batches] * n_batches if n_batches else [], n_bytes)


def _count_groups(stream: Opened) -> int:
    try:
        return int(_open_parquet(stream).num_row_groups)
    except DAMAGED:
        return 0


def _count_batches(stream: Opened) -> int:
    """1 for a stream, which is read as a whole."""
    try:
        reader = _open_arrow(stream)
        return int(reader.num_record_batches) if _is_file(reader) else 1
    except DAMAGED:
        return 0


PARQUET = Reader(
    "parquet", ("parquet", "pq"), _read_parquet, _cut_parquet, may_be_compressed=False, compresses=True,
    unit="row group", count=_count_groups,
)  # fmt: skip
ARROW = Reader(
    "arrow", ("arrow", "feather", "ipc"), _read_arrow, _cut_arrow, may_be_compressed=False,
    unit="record batch", count=_count_batches,
)  # fmt: skip
