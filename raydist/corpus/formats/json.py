"""JSON Lines; and .json files: arrays of objects, read without holding the file, columns, or lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import Any

import orjson

from raydist.corpus.formats.reader import Cut, Reader, cut_lines
from raydist.corpus.formats.records import (
    CHUNK_BYTES,
    MAX_RECORD_BYTES,
    Bad,
    ByteRecord,
    Item,
    NoColumn,
    Part,
    ReadOptions,
    Record,
    Torn,
    listed,
    too_long,
    unit_of,
    utf8_fault,
)
from raydist.corpus.formats.streams import Opened, blocks, lines_but_long_ones, lines_of, whole_lines

KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array",
         dict: "an object", str: "a string"}  # fmt: skip
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)
COLUMN_ROWS = 1024
"""Rows in one list of items of a file of columns, which is in memory as a whole."""
ORJSON_DEPTH = 1024
"""Levels of objects and arrays that orjson reads."""
COLUMNS_BYTES = 2**30
"""A file of columns may have as many."""
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
OBJECT_HEAD = re.compile(rb'\s*(\{\s*"[^"\\]*")')


def _read_jsonl(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    return _read_lines(lines_but_long_ones(blocks(stream, part)), options.text_column)


def _cut_jsonl(stream: Opened, n_bytes: int, _: ReadOptions) -> list[Cut]:
    return cut_lines(stream, n_bytes)


def _read_json(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """A file whose first character is '[' is an array. Any other is of lines, or, if whole, of columns."""
    first, content = _first_character(blocks(stream, part))
    if first == b"[" and part.start == 0:
        return _read_array((block for _, block in content), options.text_column)
    is_whole = part.start == 0 and part.end in (-1, stream.file.size)
    if is_whole and first == b"{":
        return _read_columns_or_lines(whole_lines(content, COLUMNS_BYTES), options.text_column)
    return _read_lines(lines_but_long_ones(content), options.text_column)


def _cut_json(stream: Opened, n_bytes: int, _: ReadOptions) -> list[Cut]:
    """An array is not cut."""
    try:
        is_array = _first_character(blocks(stream))[0] == b"["
    except Torn:  # it is not UTF-8, or blank
        return []
    return [] if is_array else cut_lines(stream, n_bytes)


def _first_character(
    content: Iterator[tuple[int, bytes]],
) -> tuple[bytes, Iterator[tuple[int, bytes]]]:
    """The first character that is no white space, b"" if there is none; and the same content.

    Torn: there is much white space before it.
    """
    seen = []
    for offset, block in content:
        seen.append((offset, block))
        if first := block.lstrip()[:1]:
            return first, chain(seen, content)
        if offset > MAX_RECORD_BYTES:
            raise Torn(too_long("white space"))
    return b"", iter(seen)


def getter(column: str) -> Callable[[Any], Any]:
    """Gives the value of `column` of an object; dots enter objects unless a key has the dotted name."""
    if "." not in column:
        return itemgetter(column)
    path = column.split(".")

    def get(value: Any) -> Any:
        if column in value:
            return value[column]
        for key in path:
            value = value[key]
        return value

    return get


class _Pairs(list[tuple[str, Any]]):
    """An object with every key, also those that occur twice."""


class _Key:
    """The text column's key. Of a key that occurs twice orjson keeps the last value, which is a guess."""

    def __init__(self, column: str) -> None:
        self.column, self.path = column, column.split(".")
        # Of letters and digits \u00.. is the only other spelling.
        is_simple = column.isascii() and column.replace("_", "").isalnum()
        self._quoted = f'"{column}"'.encode() if is_simple else b"\n no JSON"
        self._written = {name: _ways_to_write(name) for name in (column, *self.path)}

    def occurs_once(self, raw: bytes, n: int) -> bool:
        """Whether n records, which all have a value of the column, surely have one. raw: their JSON.

        Counting is fast. It counts the keys of inner objects too, so False says nothing.
        """
        if raw.count(self._quoted) == n and not (b"\\" in raw and b"\\u00" in raw):
            return True
        count = {name: len(written.findall(raw)) for name, written in self._written.items()}
        if len(count) == 1 or count[self.column]:
            return count[self.column] == n
        return all(count[name] == n * self.path.count(name) for name in self.path)

    def none_dropped(self, raw: bytes, records: Iterable[Any]) -> bool:
        """Whether `records`, parsed from `raw`, have the key as often as it does, inner objects and all."""
        records = list(records)
        return all(
            len(written.findall(raw)) == _n_keys(records, name) for name, written in self._written.items()
        )

    def repeats(self, raw: bytes) -> bool:
        """Whether the key occurs twice in a record. raw: its valid JSON."""
        return self._repeats(_with_every_key(raw))

    def which_repeat(self, raw: bytes) -> list[bool]:
        """The same of each record of an array. raw: the array, valid JSON."""
        return list(map(self._repeats, _with_every_key(raw)))

    def _repeats(self, record: Any) -> bool:
        has_column = isinstance(record, _Pairs) and self.column in dict(record)
        for name in [self.column] if has_column else self.path:
            values = [value for key, value in record if key == name] if isinstance(record, _Pairs) else []
            if len(values) != 1:
                return len(values) > 1
            record = values[0]
        return False


_key = cache(_Key)


def _n_keys(values: Iterable[Any], name: str) -> int:
    """Objects within `values` that have this key."""
    count, left = 0, list(values)
    while left:
        value = left.pop()
        if isinstance(value, dict):
            count += name in value
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count


def _with_every_key(raw: bytes) -> Any:
    """Objects become _Pairs. Slow."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + ORJSON_DEPTH)
    try:
        return json.loads(raw, object_pairs_hook=_Pairs, parse_int=float)
    finally:
        sys.setrecursionlimit(limit)


def _ways_to_write(name: str) -> re.Pattern[bytes]:
    """Matches the key `name`, however its characters are escaped, and its colon."""

    def ways(character: str) -> Iterator[bytes]:
        yield re.escape(character.encode("utf-8", "surrogatepass"))
        code = character.encode("utf-16-be", "surrogatepass").hex()
        units = (code[start : start + 4] for start in range(0, len(code), 4))
        yield b"".join(rb"\\(?i:u%s)" % unit.encode() for unit in units)
        if character in ESCAPES:
            yield re.escape(f"\\{ESCAPES[character]}".encode())

    return re.compile(b'"' + b"".join(b"(?:%s)" % b"|".join(ways(c)) for c in name) + rb'"\s*:')


def _repeated(row: int, column: str, kind: type[Record]) -> Bad:
    return Bad(
        row, f"the field '{column}' occurs more than once: which one holds the text is a guess", unit_of(kind)
    )


def text_item(value: Any, row: int, column: str, kind: type[Record]) -> Item:
    """kind: what it becomes, which says what `row` counts."""
    if not isinstance(value, dict):
        return Bad(row, f"the record is {KINDS[type(value)]}, not an object", unit_of(kind))
    try:
        text = getter(column)(value)
    except (KeyError, TypeError):
        return NoColumn(row, f"no field '{column}' (fields: {listed(list(value))})", unit_of(kind))
    return _value_item(text, row, column, kind)


def _value_item(text: Any, row: int, column: str, kind: type[Record]) -> Item:
    if isinstance(text, str):
        return kind(text, row)
    fault = f"{column} is null" if text is None else f"{column} is {KINDS[type(text)]}, not a string"
    return Bad(row, fault, unit_of(kind))


def parsed_item(raw: bytes, row: int, column: str, kind: type[Record]) -> Item:
    key = _key(column)
    try:
        value = orjson.loads(raw)
        if not key.occurs_once(raw, 1) and key.repeats(raw):
            return _repeated(row, column, kind)
        return text_item(value, row, column, kind)
    except orjson.JSONDecodeError as error:  # its own text counts lines, from the record's start
        fault = f"invalid JSON: {error.msg} at character {error.pos} of the record"
        return Bad(row, utf8_fault(raw) or fault, unit_of(kind))


def _all_strings(values: list[Any]) -> bool:
    return set(map(type, values)) <= {str}


def _read_lines(chunks: Iterable[tuple[int, bytes | None]], column: str) -> Iterator[list[Item]]:
    """chunks: (offset, whole lines). A chunk in which anything is unusual is read again line by line."""
    get, loads, key = getter(column), orjson.loads, _key(column)
    for offset, chunk in chunks:
        if chunk is None:
            yield [Bad(offset, too_long("a line"), "byte")]
            continue
        lines, rows = lines_of(offset, chunk)
        try:
            texts = [get(loads(line)) for line in lines]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            texts = [None]
        if _all_strings(texts):
            items: list[Item] = list(map(ByteRecord._make, zip(texts, rows, strict=True)))
            if not (key.occurs_once(chunk, len(lines)) or key.none_dropped(chunk, map(loads, lines))):
                repeats = (not key.occurs_once(line, 1) and key.repeats(line) for line in lines)
                items = [
                    _repeated(item[1], column, ByteRecord) if again else item  # type: ignore[arg-type]
                    for item, again in zip(items, repeats, strict=True)
                ]
            yield items
        else:
            numbered = zip(lines, rows, strict=True)
            yield [parsed_item(line, row, column, ByteRecord) for line, row in numbered if line.strip()]


def _read_columns_or_lines(chunks: Iterator[tuple[int, bytes]], column: str) -> Iterator[list[Item]]:
    """chunks: of a whole file. If it is one object whose text column is an object or an array, it holds
    columns, as pandas writes them; `row` counts the rows. Else it holds lines."""
    first = next(chunks, None)
    if first is None:
        return
    texts = _column(first[1], column)
    if texts is None:
        yield from _read_lines(chain([first], chunks), column)
    elif (second := next(chunks, None)) is not None:
        yield from _read_lines(chain([first, second], chunks), column)
    else:
        items = [_value_item(text, row, column, Record) for row, text in enumerate(texts)]
        yield from (items[start : start + COLUMN_ROWS] for start in range(0, len(items), COLUMN_ROWS))


def _column(chunk: bytes, column: str) -> list[Any] | None:
    """The text column of the only line in `chunk`; None if there are more lines, or it is no column."""
    if b"\n" in chunk.strip():
        return None
    with suppress(orjson.JSONDecodeError, KeyError, TypeError):
        values = getter(column)(orjson.loads(chunk))
        if not _key(column).occurs_once(chunk, 1) and _key(column).repeats(chunk):
            return None
        values = list(values.values()) if isinstance(values, dict) else values
        return values if isinstance(values, list) else None
    return None


def _read_array(content: Iterable[bytes], column: str) -> Iterator[list[Item]]:
    """content: blocks of an array of objects, from its '['. `row` counts the elements."""
    array = _Array(column)
    torn = None
    try:
        for block in content:
            if items := array.feed(block):
                yield items
    except Torn as error:
        torn = error
    yield array.finish(torn)


class _Array:
    """An array of objects whose elements are taken off the front while it is read."""

    def __init__(self, column: str) -> None:
        self.column, self.get, self.key = column, getter(column), _key(column)
        self.pending = b""
        self.wanted = CHUNK_BYTES  # bytes to hold before the next attempt
        self.row = 0
        self.opened = self.closed = False

    def feed(self, block: bytes) -> list[Item]:
        self.pending += block
        if not self.opened:
            start = self.pending.lstrip()
            self.opened, self.pending = bool(start), start[1:]
        if len(self.pending) < self.wanted:
            return []
        items = self._take()
        if len(self.pending) > MAX_RECORD_BYTES:
            raise Torn(f"{too_long('an element')} follows record {self.row - 1}")
        # An element longer than a chunk: reading as much again keeps the work linear.
        self.wanted = CHUNK_BYTES if items else 2 * len(self.pending)
        return items

    def finish(self, torn: Torn | None) -> list[Item]:
        """The elements that are left, and one Bad if the file does not end as an array does."""
        if not (torn or self.closed):
            with suppress(orjson.JSONDecodeError):
                return self._items(b"[" + self.pending)
        items = self._scan()
        if torn:
            return [*items, Bad(None, str(torn))]
        if not self.closed:
            return [*items, Bad(None, f"invalid JSON: the array does not end after {self.row} records")]
        rest = self.pending.strip()
        return [*items, Bad(None, f"invalid JSON: {rest[:20]!r} after the array's end")] if rest else items

    def _take(self) -> list[Item]:
        """Every element except the last, parsed at once.

        The last one is guessed to start where the text of the first one's start occurs for the last time.
        The text before it parses only if the guess is right: else its brackets do not balance.
        """
        if self.closed:
            self.pending = self.pending.strip()[:20]
            return []
        head = OBJECT_HEAD.match(self.pending)
        last = self.pending.rfind(head[1], head.end()) if head else -1
        body = self.pending[: max(0, last)].rstrip()
        if not body.endswith(b","):
            return self._scan()
        try:
            items = self._items(b"[" + body[:-1] + b"]")
        except orjson.JSONDecodeError:
            return self._scan()
        self.pending = self.pending[last:]
        return items

    def _items(self, array: bytes) -> list[Item]:
        values = orjson.loads(array)
        first, self.row = self.row, self.row + len(values)
        rows = range(first, self.row)
        try:
            texts = list(map(self.get, values))
        except (KeyError, TypeError):
            texts = [None]
        is_clear = self.key.occurs_once(array, len(texts)) or self.key.none_dropped(array, values)
        if _all_strings(texts) and is_clear:
            return list(map(Record._make, zip(texts, rows, strict=True)))
        return [
            _repeated(row, self.column, Record) if again else text_item(value, row, self.column, Record)
            for value, row, again in zip(values, rows, self.key.which_repeat(array), strict=True)
        ]

    def _scan(self) -> list[Item]:
        """The complete elements of `pending`, found by brackets and parsed one by one: works for bad ones."""
        items: list[Item] = []
        depth = start = 0
        for token in TOKEN.finditer(self.pending) if not self.closed else ():
            kind = token[0][:1]
            if kind == b'"' and len(token[0]) == 1:
                break  # a string that is not complete yet
            if kind in b"{[":
                depth += 1
            elif depth == 0 and kind in b",]":
                self.closed = kind == b"]"
                raw = self.pending[start : token.start()].strip()
                if raw or kind == b",":  # a comma before the ] is allowed
                    items.append(parsed_item(raw, self.row, self.column, Record))
                    self.row += 1
                start = token.end()
                if self.closed:
                    break
            elif kind in b"}]":
                depth = max(0, depth - 1)
        self.pending = self.pending[start:]
        return items


JSONL = Reader("jsonl", ("jsonl", "ndjson"), _read_jsonl, _cut_jsonl)
JSON = Reader("json", ("json",), _read_json, _cut_json)
