"""JSON Lines; and .json files: arrays of objects, read without holding the file, lines, or one object.

One object is one document, or columns as pandas writes them, or, with the source's `records`, it holds a list
of objects.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain, islice
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
    Wrapped,
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
OBJECT_BYTES = 2**30
"""A file that is one object may have as many, in lines of any length."""
NOT_STRICT = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")
"""What Python's json reads and writes, and orjson refuses: numbers that JSON has not, halves of a pair."""
HALF_PAIR = re.compile("[\ud800-\udfff]")
LISTS_DEPTH = 4
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
OBJECT_HEAD = re.compile(rb'\s*(\{\s*"[^"\\]*")')


def _read_jsonl(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    return _read_lines(lines_but_long_ones(blocks(stream, part)), options.text_column)


def _cut_jsonl(stream: Opened, n_bytes: int, _: ReadOptions) -> list[Cut]:
    return cut_lines(stream, n_bytes)


def _read_json(stream: Opened, part: Part, options: ReadOptions) -> Iterator[list[Item]]:
    """A file whose first character is '[' is an array. Any other is of lines, or, if whole, one object."""
    first, content = _first_character(blocks(stream, part))
    if first == b"[" and part.start == 0:
        if options.records:
            return iter([[Wrapped(None, f"no object around '{options.records}': the file itself is a list")]])
        return _read_array((block for _, block in content), options.text_column)
    is_whole = part.start == 0 and part.end in (-1, stream.file.size)
    if is_whole and first == b"{":
        return _read_object_or_lines(whole_lines(content, OBJECT_BYTES), options)
    return _read_lines(lines_but_long_ones(content), options.text_column)


def _cut_json(stream: Opened, n_bytes: int, options: ReadOptions) -> list[Cut]:
    """An array is not cut, nor an object over several lines."""
    try:
        first, content = _first_character(blocks(stream))
        head = b"".join(block for _, block in islice(content, 2)).lstrip()
    except Torn:  # it is not UTF-8, or blank
        return []
    line, newline, _ = head.partition(b"\n")
    if options.records or first == b"[" or (newline and _is_open(line)):
        return []
    return cut_lines(stream, n_bytes)


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


def loads(raw: bytes) -> Any:
    """The value of a record. Raises orjson.JSONDecodeError.

    Python's json reads what orjson refuses only for NaN, Infinity, or half of a surrogate pair in a text.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        if NOT_STRICT.search(raw) and _depth(raw) < ORJSON_DEPTH:
            with suppress(ValueError):
                return _python_loads(raw)
        raise


def _depth(raw: bytes) -> int:
    """Levels of objects and arrays in each other, at most."""
    level = most = 0
    for token in TOKEN.finditer(raw):
        level += (token[0] in b"{[") - (token[0] in b"]}")
        most = max(most, level)
    return most


def _is_open(raw: bytes) -> bool:
    """Whether an object or array that begins in `raw` goes on after it."""
    with suppress(orjson.JSONDecodeError):
        orjson.loads(raw)
        return False
    level = 0
    for token in TOKEN.finditer(raw):
        level += (token[0] in b"{[") - (token[0] in b"]}")
    return level > 0


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
        return self.repeats_in(_with_every_key(raw))

    def which_repeat(self, raw: bytes) -> list[bool]:
        """The same of each record of an array. raw: the array, valid JSON."""
        return list(map(self.repeats_in, _with_every_key(raw)))

    def repeats_in(self, record: Any) -> bool:
        """The same of a record that was parsed with every key."""
        has_column = isinstance(record, _Pairs) and self.column in dict(record)
        for name in [self.column] if has_column else self.path:
            values = [value for key, value in record if key == name] if isinstance(record, _Pairs) else []
            if len(values) != 1:
                return len(values) > 1
            record = values[0]
        return False

    def value_in(self, record: Any) -> Any:
        """The value of a key that occurs once, and exists, in a record that was parsed with every key."""
        for name in [self.column] if self.column in dict(record) else self.path:
            record = dict(record)[name]
        return record


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
    return _python_loads(raw, object_pairs_hook=_Pairs)


def _python_loads(raw: bytes, **options: Any) -> Any:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + ORJSON_DEPTH)
    try:
        return json.loads(raw.decode(), parse_int=float, **options)
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
        if HALF_PAIR.search(text):
            return Bad(row, f"{column} has half of a surrogate pair, which is no character", unit_of(kind))
        return kind(text, row)
    if text is None or text != text:
        return Bad(row, f"{column} is {'null' if text is None else 'NaN'}", unit_of(kind))
    return Bad(row, f"{column} is {KINDS[type(text)]}, not a string", unit_of(kind))


def parsed_item(raw: bytes, row: int, column: str, kind: type[Record]) -> Item:
    key = _key(column)
    try:
        value = loads(raw)
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
    get, parse, key = getter(column), orjson.loads, _key(column)
    for offset, chunk in chunks:
        if chunk is None:
            yield [Bad(offset, too_long("a line"), "byte")]
            continue
        lines, rows = lines_of(offset, chunk)
        try:
            texts = [get(parse(line)) for line in lines]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            texts = [None]
        if _all_strings(texts):
            items: list[Item] = list(map(ByteRecord._make, zip(texts, rows, strict=True)))
            if not (key.occurs_once(chunk, len(lines)) or key.none_dropped(chunk, map(parse, lines))):
                repeats = (not key.occurs_once(line, 1) and key.repeats(line) for line in lines)
                items = [
                    _repeated(item[1], column, ByteRecord) if again else item  # type: ignore[arg-type]
                    for item, again in zip(items, repeats, strict=True)
                ]
            yield items
        else:
            numbered = zip(lines, rows, strict=True)
            yield [parsed_item(line, row, column, ByteRecord) for line, row in numbered if line.strip()]


def _read_object_or_lines(chunks: Iterator[tuple[int, bytes]], options: ReadOptions) -> Iterator[list[Item]]:
    """chunks: of a whole file that begins with '{'. If it is valid JSON it is one object, else lines."""
    first = next(chunks, None)
    if first is None:
        return
    line, _, rest = first[1].lstrip().partition(b"\n")
    held, size, torn = [first], len(first[1]), None
    is_line = not rest.strip()
    is_object = is_line or _is_open(line)
    try:
        while is_object and (chunk := next(chunks, None)):
            held.append(chunk)
            size += len(chunk[1])
            if is_line and chunk[1].strip():
                is_line, is_object = False, _is_open(line)
            is_object = is_object and size <= OBJECT_BYTES
    except Torn as error:
        torn, is_object = error, False
    value = None
    if is_object:
        raw = b"".join(chunk for _, chunk in held).strip()
        with suppress(orjson.JSONDecodeError):
            value = loads(raw)
    if isinstance(value, dict):
        yield from _read_object(value, raw, held, options)
        return
    if options.records:
        yield [Wrapped(None, f"no object around '{options.records}': the file is not one JSON object")]
        return
    yield from _read_lines(chain(held, chunks), options.text_column)
    if torn:
        raise torn


def _read_object(
    value: dict[str, Any], raw: bytes, chunks: list[tuple[int, bytes]], options: ReadOptions
) -> Iterator[list[Item]]:
    """raw: the JSON of `value`, the only object of a file.  chunks: the file as it is.

    If the text column is an object or an array, it is a column as pandas writes it; `row` counts its rows.
    """
    column, key = options.text_column, _key(options.text_column)
    if options.records:
        yield from _in_lists_of(_records_inside(value, raw, options.records, column))
        return
    texts = None
    try:
        texts = getter(column)(value)
    except (KeyError, TypeError):
        if lists := _lists_of_records(value, column):
            yield [Wrapped(None, f"no field '{column}': it is one object, with lists of records at {lists}")]
            return
    if isinstance(texts, dict | list) and (key.occurs_once(raw, 1) or not key.repeats(raw)):
        rows = texts.values() if isinstance(texts, dict) else texts
        yield from _in_lists_of([_value_item(text, row, column, Record) for row, text in enumerate(rows)])
    elif b"\n" not in raw:
        yield from _read_lines(chunks, column)
    else:
        offset, first = chunks[0]
        offset += len(first) - len(first.lstrip())
        is_long = len(raw) > MAX_RECORD_BYTES
        long = Bad(offset, too_long("an object"), "byte")
        yield [long if is_long else parsed_item(raw, offset, column, ByteRecord)]


def _in_lists_of(items: list[Item]) -> Iterator[list[Item]]:
    return (items[start : start + COLUMN_ROWS] for start in range(0, len(items), COLUMN_ROWS))


def _records_inside(value: dict[str, Any], raw: bytes, records: str, column: str) -> list[Item]:
    """The elements of the list at the path `records` of the file's only object. raw: its JSON."""
    try:
        found = getter(records)(value)
    except (KeyError, TypeError):
        found = None
    if not isinstance(found, list):
        lists = _lists_of_records(value, column)
        return [Wrapped(None, f"no list at '{records}'{f', but at {lists}' if lists else ''}")]
    if _key(records).none_dropped(raw, [value]) and _key(column).none_dropped(raw, [value]):
        return [text_item(element, row, column, Record) for row, element in enumerate(found)]
    if _key(records).repeats(raw):
        return [Bad(None, f"the field '{records}' occurs more than once: which one is the list is a guess")]
    repeats = map(_key(column).repeats_in, _key(records).value_in(_with_every_key(raw)))
    return [
        _repeated(row, column, Record) if again else text_item(element, row, column, Record)
        for row, (element, again) in enumerate(zip(found, repeats, strict=True))
    ]


def _lists_of_records(value: dict[str, Any], column: str) -> str:
    """Paths of the lists of objects in `value`: of those whose first has the column, if there are any."""
    found: dict[str, bool] = {}
    level = {"": value}
    for _ in range(LISTS_DEPTH):
        inside = {f"{path}{name}": inner for path, of in level.items() for name, inner in of.items()}
        lists = {path: inner for path, inner in inside.items() if isinstance(inner, list) and inner}
        for path, inner in lists.items():
            if isinstance(inner[0], dict):
                found[path] = isinstance(text_item(inner[0], 0, column, Record), Record)
        level = {f"{path}.": inner for path, inner in inside.items() if isinstance(inner, dict)}
    return listed([path for path, has_text in found.items() if has_text] or list(found))


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
