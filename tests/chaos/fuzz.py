"""Damaged files of every format: raydist's reader reads them or says what is wrong, and never crashes.

Each file is a sound one with bits flipped, cut, zeroed, swapped, doubled, added or a length overwritten.
Child processes of limited memory read many of them, one after the other, with on_error "quarantine" and
"fail". A file is right if

    - the reader neither crashes nor hangs, and raises nothing but RaydistError;
    - every row whose bytes are whole is read, or something is said: an unreadable record, a refused file;
    - both modes say the same.

Formats without checksums cannot tell a changed byte within a text: such a text may be another one. The seed
and the number of a file decide all of it. Exit status 0: all were right.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import random
import resource
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raydist.corpus.formats import Bad
from raydist.corpus.slices import read_slice
from raydist.corpus.source import open_source
from raydist.errors import RaydistError
from raydist.job.schema import Corpus, Source

FILES = 2000
PATIENCE_SECONDS = 60.0
MEMORY_BYTES = 6 * 2**30
"""Of address space, for a child and for its decoder."""
SLICE_BYTES = (4096, 2**20)
ROWS = 150
OUTCOMES = ("exact", "changed", "quarantined", "refused")
LENGTHS = (-1, 0, 1, 2**31 - 1, -(2**31), 2**24, 2**40, 2**62, 255)


def texts() -> list[str]:
    """All different, with quotes, commas and letters of several bytes."""
    rng = random.Random(0)
    words = ["plain", "words", 'a "quote"', "comma, comma", "naïve", "日本", "back\\slash", "x" * 40]
    return [f"document {i:03d} " + " ".join(rng.choices(words, k=rng.randint(1, 30))) for i in range(ROWS)]


# --- sound files


def _table(kind: pa.DataType | None = None) -> pa.Table:
    column = pa.array(texts(), kind or pa.string())
    return pa.table({"id": list(range(ROWS)), "text": column})


def _parquet(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(_table(), sink, row_group_size=50, **options)
    return sink.getvalue()


def _arrow(new: Callable[..., object], table: pa.Table, compression: str | None = None) -> bytes:
    sink, options = io.BytesIO(), pa.ipc.IpcWriteOptions(compression=compression)
    with new(sink, table.schema, options=options) as writer:  # type: ignore[attr-defined]
        for batch in table.to_batches(max_chunksize=50):
            writer.write_batch(batch)
    return sink.getvalue()


def _feather() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(_table(), sink, chunksize=50)
    return sink.getvalue()


def _jsonl() -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts())
    ).encode()


def _separated(delimiter: str) -> bytes:
    sink = io.StringIO()
    rows = csv.writer(sink, delimiter=delimiter, lineterminator="\n")
    rows.writerows([("id", "text"), *enumerate(texts())])
    return sink.getvalue().encode()


def _txt() -> bytes:
    return "".join(text + "\n" for text in texts()).encode()


def _lz4(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


SOUND: dict[str, Callable[[], bytes]] = {
    "a.parquet": _parquet,
    "plain.parquet": lambda: _parquet(compression="none", use_dictionary=False),
    "crc.parquet": lambda: _parquet(compression="zstd", write_page_checksum=True),
    "a.arrow": lambda: _arrow(pa.ipc.new_file, _table()),
    "view.arrow": lambda: _arrow(pa.ipc.new_file, _table(pa.string_view())),
    "dictionary.arrow": lambda: _arrow(
        pa.ipc.new_file, _table().set_column(1, "text", pa.array(texts()).dictionary_encode())
    ),
    "zstd.arrow": lambda: _arrow(pa.ipc.new_file, _table(pa.large_string()), "zstd"),
    "stream.arrow": lambda: _arrow(pa.ipc.new_stream, _table()),
    "a.feather": _feather,
    "a.jsonl": _jsonl,
    "array.json": lambda: json.dumps([{"text": text} for text in texts()]).encode(),
    "columns.json": lambda: json.dumps({"text": texts(), "id": list(range(ROWS))}).encode(),
    "a.csv": lambda: _separated(","),
    "a.tsv": lambda: _separated("\t"),
    "a.txt": _txt,
    "a.jsonl.gz": lambda: gzip.compress(_jsonl(), mtime=0),
    "a.jsonl.zst": lambda: zstandard.compress(_jsonl()),
    "a.txt.xz": lambda: lzma.compress(_txt()),
    "a.csv.bz2": lambda: bz2.compress(_separated(",")),
    "a.txt.lz4": lambda: _lz4(_txt()),
}
"""By the name of the file."""
CHECKED = (".gz", ".xz", ".bz2", "crc.parquet")
"""These have checksums over their whole content: no text may change."""
LINES = ("a.jsonl", "a.txt", "a.csv", "a.tsv", "array.json", "columns.json")
"""In these a row's bytes can be looked for."""


@cache
def sound(name: str) -> bytes:
    return SOUND[name]()


# --- damage


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 4, 16, 64, 512, 4096]))


def _place(data: bytes, rng: random.Random) -> int:
    """Where it hurts: half of all in the first or last KiB, where headers and footers stand."""
    near = rng.randrange(min(1024, len(data)))
    return rng.choice([near, len(data) - 1 - near, rng.randrange(len(data)), rng.randrange(len(data))])


def _bits(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        damaged[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _byte(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[_place(data, rng)] = rng.choice(
        [0, 1, 2, 6, 12, 0x15, 0x1C, 0x22, 0x7F, 0xFF, rng.randrange(256)]
    )
    return bytes(damaged)


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _swapped(data: bytes, rng: random.Random) -> bytes:
    size = min(rng.choice([16, 512, 4096]), len(data) // 2)
    a, b = sorted(rng.randrange(len(data) // size) * size for _ in range(2))
    damaged = bytearray(data)
    damaged[a : a + size], damaged[b : b + size] = data[b : b + size], data[a : a + size]
    return bytes(damaged[: len(data)])


def _doubled(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:end] + data[start:end] + data[end:]


def _length(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(["<i", "<q"])
    value = rng.choice([*LENGTHS, rng.randrange(2**31)])
    packed = struct.pack(kind, max(-(2**31), min(value, 2**31 - 1)) if kind == "<i" else value)
    start = _place(data, rng) // 4 * 4
    return data[:start] + packed + data[start + len(packed) :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": _bits,
    "byte": _byte,
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "zeroed": _zeroed,
    "swapped": _swapped,
    "doubled": _doubled,
    "junk": lambda data, rng: data + rng.randbytes(rng.choice([1, 8, 100, 5000])),
    "length": _length,
}


# --- reading


@dataclass(frozen=True)
class Result:
    """Of one damaged file. outcome: one of OUTCOMES, or what is wrong with it."""

    number: int
    name: str
    damage: str
    outcome: str
    detail: str = ""


def check(seed: int, number: int, folder: Path) -> Result:
    """Damage a file in `folder` and read it in both modes."""
    rng = random.Random(f"{seed} {number}")
    names = list(SOUND)
    name, how = names[number % len(names)], rng.choice(list(DAMAGE))
    damaged = DAMAGE[how](sound(name), rng)
    path = folder / name
    path.write_bytes(damaged)
    slice_bytes = rng.choice(SLICE_BYTES)
    try:
        found, bad = _read(path, "quarantine", slice_bytes)
        strict = _read(path, "fail", slice_bytes)[1]
    except Exception as error:  # noqa: BLE001 - what is looked for
        return Result(number, name, how, "raised", f"{type(error).__name__}: {error}"[:300])
    finally:
        path.unlink()
    outcome, detail = _judged(name, damaged, found, bad)
    if bool(strict) != bool(bad):
        outcome, detail = "modes differ", f"{bad} and {strict}"
    return Result(number, name, how, outcome, detail)


def _read(path: Path, on_error: str, slice_bytes: int) -> tuple[list[str], list[str]]:
    """Texts, and what was said. A refusal is the one thing said."""
    corpus = Corpus.model_validate(
        {"sources": {"s": {"path": str(path)}}, "on_error": on_error, "slice_bytes": slice_bytes}
    )
    found, bad = [], []
    try:
        source = open_source(Source(path=str(path)), corpus)
        for entry in source.plan():
            for chunk in read_slice(source.files, entry, source.options):
                for _, item in chunk:
                    if isinstance(item, Bad):
                        bad.append(item.reason)
                        if on_error == "fail":
                            return found, bad
                    else:
                        found.append(item.text)
    except RaydistError as error:
        return found, [f"refused: {error.what} ({error.why})"]
    return found, bad


def _judged(name: str, damaged: bytes, found: list[str], bad: list[str]) -> tuple[str, str]:
    if bad:
        return ("refused" if bad[0].startswith("refused: ") else "quarantined"), bad[0][:300]
    before = texts()
    if Counter(found) == Counter(before):  # slices are in an order of their own
        return "exact", ""
    if name.endswith(CHECKED):
        return "changed although it has a checksum", _difference(before, found)
    if lost := _lost(name, damaged, before, found):
        return "lost in silence", lost
    return "changed", _difference(before, found)


def _lost(name: str, damaged: bytes, before: list[str], found: list[str]) -> str:
    """A row that was lost though its bytes are whole; of binary formats, that there are fewer rows."""
    if name not in LINES:
        n_lines = 0 if name.endswith((".zst", ".lz4")) else len(before)
        return _difference(before, found) if len(found) < n_lines else ""
    read, whole = set(found), "\n".join(found)
    for row, text in enumerate(before):
        if text not in read and _written(name, row, text) in damaged and text not in whole:
            return f"row {row}: {text[:60]}"
    return ""


def _written(name: str, row: int, text: str) -> bytes:
    """The row as it stands in the file, with what ends it."""
    if name == "a.txt":
        return f"\n{text}\n".encode()
    if name == "a.jsonl":
        return ("\n" + json.dumps({"id": row, "text": text}, ensure_ascii=False) + "\n").encode()
    if name in ("a.csv", "a.tsv"):
        starts = (f"{row},".encode(), f"{row}\t".encode())
        return b"\n" + next(line for line in sound(name).split(b"\n") if line.startswith(starts)) + b"\n"
    return json.dumps(text).encode()


def _difference(before: list[str], found: list[str]) -> str:
    changed = sum((Counter(before) - Counter(found)).values())
    return f"{len(found)} of {len(before)} rows, {changed} of them others"


# --- many files


def run(seed: int, numbers: range, folder: Path) -> Iterator[Result]:
    """Results of the files of `numbers`, read by child processes."""
    number = numbers.start
    while number < numbers.stop:
        for result in _child(seed, range(number, numbers.stop), folder):
            yield result
            number = result.number + 1


def _child(seed: int, numbers: range, folder: Path) -> Iterator[Result]:
    """Those of one child, up to the file that it crashes on or hangs at."""
    span = [str(numbers.start), str(numbers.stop)]
    command = [sys.executable, __file__, "--seed", str(seed), "--read", *span, "--storage", str(folder)]
    number = numbers.start
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child, selectors.DefaultSelector() as waiting:
        assert child.stdout is not None
        waiting.register(child.stdout, selectors.EVENT_READ)
        while waiting.select(PATIENCE_SECONDS):
            line = child.stdout.readline()
            if not line:
                code = child.wait()
                if number < numbers.stop:
                    yield _unread(seed, number, "crashed", f"exit status {code}")
                return
            yield Result(**json.loads(line))
            number += 1
        child.kill()
        yield _unread(seed, number, "hangs", f"no answer for {PATIENCE_SECONDS:.0f} s")


def _unread(seed: int, number: int, outcome: str, detail: str) -> Result:
    rng = random.Random(f"{seed} {number}")
    names = list(SOUND)
    return Result(number, names[number % len(names)], rng.choice(list(DAMAGE)), outcome, detail)


def read_in_this_process(seed: int, numbers: range, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for number in numbers:
        sys.stdout.write(json.dumps(asdict(check(seed, number, folder))) + "\n")
        sys.stdout.flush()


def main() -> int:
    options = parse()
    if options.read:
        read_in_this_process(options.seed, range(*options.read), options.storage)
        return 0
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=options.storage) as name:
        for result in run(options.seed, range(options.first, options.first + options.files), Path(name)):
            results.append(result)
            if result.outcome not in OUTCOMES:
                say(f"{result.number:5d} {result.name}, {result.damage}: {result.outcome}, {result.detail}")
    for name in SOUND:
        of_one = Counter(result.outcome for result in results if result.name == name)
        say(f"{name:18}" + "".join(f"  {of_one[outcome]:4d} {outcome}" for outcome in OUTCOMES))
    total = Counter(result.outcome for result in results)
    wrong = sum(count for outcome, count in total.items() if outcome not in OUTCOMES)
    crashes = sum("the decoder crashed" in result.detail for result in results)
    say(
        f"{len(results)} damaged files, seed {options.seed}: "
        + ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES)
        + f", {wrong} wrong; the decoder crashed on {crashes}; {time.monotonic() - begin:.0f} s"
    )
    return int(wrong > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=FILES, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first one (default: 0)")
    parser.add_argument("--storage", type=Path, help="a folder to work in (default: the temporary one)")
    parser.add_argument("--read", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
