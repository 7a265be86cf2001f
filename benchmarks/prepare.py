"""`raydist prepare` against a bare two-process script: same text, tokenizer library and kind of output.

Start-up (Ray, processes, imports, the tokenizer check) is measured apart: each side first does a small one,
then the large one. The ratio is of the large corpus's wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from raydist.cluster.connect import ray_session
from raydist.corpus.build import build_log, plan_log
from raydist.corpus.log import TokenLog
from raydist.corpus.tokenizer import TokenizerSpec, open_tokenizer, train_tokenizer
from raydist.job.schema import Corpus, TrainSource

AIM = 1.25
PROCESSES = 2
ROW_GROUP_BYTES = 8 * 2**20
FILE_BYTES = 128 * 2**20
SMALL_MB = 4
SMALL_SLICE_BYTES = 2**18
"""Several slices and row groups, so that the small corpus starts every process of either side."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_corpus(texts(options.text), SMALL_MB, folder / "small", SMALL_SLICE_BYTES)
        n_bytes = write_corpus(texts(options.text), options.mb, folder / "large", ROW_GROUP_BYTES)
        spec = tokenizer(options, folder)
        backend = open_tokenizer(spec).backend
        results = []
        for turn in range(options.repeats):
            results.append(
                {**raydist_seconds(folder, spec, turn, options), **bare_seconds(folder, spec, backend, turn)}
            )
    tell(results, n_bytes, backend, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, help="folder of parquet files with a column text (default: Python's own library)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="a Hugging Face folder (default: one trained on the text)"
    )
    parser.add_argument(
        "--mb", type=int, default=300, help="MB of text, repeated up to this (default: %(default)s)"
    )
    parser.add_argument(
        "--slice-mb", type=float, help="corpus.slice_bytes, in MiB (default: the job's default)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="turns of each side (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


# --- the corpus


def texts(folder: Path | None) -> Iterator[str]:
    """For ever: the documents of `folder`, or the standard library's files."""
    while True:
        if folder is None:
            root = Path(sysconfig.get_path("stdlib"))
            packages = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
            yield from (path.read_text("utf-8", "replace") for path in packages)
        else:
            for path in sorted(folder.glob("*.parquet")):
                yield from pq.read_table(path, columns=["text"])["text"].to_pylist()


def write_corpus(source: Iterator[str], mb: int, folder: Path, group_bytes: int) -> int:
    """Parquet files of FILE_BYTES of text in row groups of `group_bytes`; returns the bytes of text."""
    folder.mkdir()
    total, number, writer = 0, 0, None
    while total < mb * 10**6:
        size, group = 0, []
        while size < group_bytes:
            group.append(next(source))
            size += len(group[-1].encode())
        if writer is None or total // FILE_BYTES >= number:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(
                folder / f"{number:03d}.parquet", pa.schema([("text", pa.large_string())])
            )
            number += 1
        writer.write_table(pa.table({"text": pa.array(group, pa.large_string())}))
        total += size
    assert writer is not None
    writer.close()
    return total


def tokenizer(options: argparse.Namespace, folder: Path) -> TokenizerSpec:
    trained = options.tokenizer or train_tokenizer(sample(options.text), 16384, folder / "tokenizer")
    return open_tokenizer(trained).spec  # type: ignore[no-any-return]


def sample(folder: Path | None) -> Iterator[str]:
    return itertools.islice(texts(folder), 300)


# --- raydist


def raydist_seconds(
    folder: Path, spec: TokenizerSpec, turn: int, options: argparse.Namespace
) -> dict[str, Any]:
    sizes = {} if options.slice_mb is None else {"slice_bytes": int(options.slice_mb * 2**20)}
    begin = time.perf_counter()
    with ray_session(0, PROCESSES - 1):
        build(folder / "small", spec, folder / f"logs-{turn}", slice_bytes=SMALL_SLICE_BYTES)
        started = time.perf_counter()
        log = build(folder / "large", spec, folder / f"logs-{turn}", **sizes)
        done = time.perf_counter()
    totals = {"n_tokens": log.n_tokens, "shards": len(log.shards)}
    return {"raydist_start": started - begin, "raydist": done - started, **totals}


def build(source: Path, spec: TokenizerSpec, logs: Path, **sizes: int) -> TokenLog:
    wanted = TrainSource(path=str(source))
    corpus = Corpus(sources={"text": wanted}, **sizes)
    return build_log(plan_log(wanted, corpus, spec, logs), on_error="fail")


# --- the bare script


def bare_seconds(folder: Path, spec: TokenizerSpec, backend: str, turn: int) -> dict[str, Any]:
    """Each process takes every second row group and writes one Arrow file, with raydist's columns."""
    target = folder / f"bare-{turn}"
    target.mkdir()
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        tools = (spec.json, backend, spec.vocab_size)
        spawn = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(spawn.Pool(1, start, tools)) for _ in range(PROCESSES)]
        halves(pools, folder / "small", target)
        started = time.perf_counter()
        n_tokens = halves(pools, folder / "large", target)
        done = time.perf_counter()
    return {"bare_start": started - begin, "bare": done - started, "bare_n_tokens": n_tokens}


def halves(pools: list[Any], source: Path, target: Path) -> int:
    files = [target / f"{source.name}-{i}.arrow" for i in range(PROCESSES)]
    tasks = [pool.apply_async(half, (source, files[i], i)) for i, pool in enumerate(pools)]
    return sum(task.get() for task in tasks)


_ENCODE: Any = None


def start(content: str, backend: str, vocab_size: int) -> None:
    global _ENCODE
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    _ENCODE = (
        fastokens_encoder(content, dtype) if backend == "fastokens" else reference_encoder(content, dtype)
    )


def fastokens_encoder(content: str, dtype: Any) -> Any:
    import fastokens

    fast = fastokens.Tokenizer.from_json_str(content)

    def encode(batch: list[str]) -> tuple[Any, Any]:
        ids, offsets = fast.encode_batch_flat(batch, split_special_tokens=True)
        return np.frombuffer(ids, "<u4").astype(dtype), np.frombuffer(offsets, "<u8").astype(np.int64)

    return encode


def reference_encoder(content: str, dtype: Any) -> Any:
    import tokenizers

    reference = tokenizers.Tokenizer.from_str(content)
    reference.encode_special_tokens = True

    def encode(batch: list[str]) -> tuple[Any, Any]:
        ids = [np.array(e.ids, dtype) for e in reference.encode_batch_fast(batch, add_special_tokens=False)]
        return np.concatenate(ids), np.cumsum([0, *map(len, ids)])

    return encode


def half(source: Path, target: Path, process: int) -> int:
    n_tokens, writer = 0, None
    files = sorted(source.glob("*.parquet"))
    groups = [
        (number, g) for number, path in enumerate(files) for g in range(pq.ParquetFile(path).num_row_groups)
    ]
    for number, group in groups[process::PROCESSES]:
        batch = pq.ParquetFile(files[number]).read_row_group(group, columns=["text"])["text"].to_pylist()
        table = encode_table(batch, [path.name for path in files], number)
        writer = writer or pa.ipc.new_file(target, table.schema)
        writer.write_table(table)
        n_tokens += sum(len(chunk.values) for chunk in table["input_ids"].chunks)
    if writer is not None:
        writer.close()
    return n_tokens


def encode_table(batch: list[str], names: list[str], number: int) -> pa.Table:
    raw = [text.encode() for text in batch]
    ids, offsets = _ENCODE(batch)
    return pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(offsets, ids),
            "hash": pa.array([xxhash.xxh3_128_digest(text) for text in raw], pa.binary(16)),
            "n_bytes": pa.array([len(text) for text in raw], pa.int64()),
            "file": pa.DictionaryArray.from_arrays(pa.array(np.full(len(batch), number, np.int32)), names),
            "row": pa.array(range(len(batch)), pa.int64()),
        }
    )


# --- the result


def tell(results: list[dict[str, Any]], n_bytes: int, backend: str, *, as_json: bool) -> None:
    """The best turn of each side: what the machine did besides only ever adds."""
    for result in results:
        assert result["n_tokens"] == result["bare_n_tokens"], "both sides must make the same tokens"
    best = {key: min(r[key] for r in results) for key in ("raydist", "bare", "raydist_start", "bare_start")}
    ratio = best["raydist"] / best["bare"]
    mb = n_bytes / 10**6
    if as_json:
        seconds = {f"{key}_seconds": round(value, 2) for key, value in best.items()}
        print(
            json.dumps({"mb": round(mb), "backend": backend, **seconds, "ratio": round(ratio, 3), "aim": AIM})
        )
        return
    made = f"{results[0]['n_tokens']:,} tokens, {results[0]['shards']} shards"
    print(f"prepare         {mb:.0f} MB of text, {made}, {backend}")
    for side in ("raydist", "bare"):
        rate = mb / best[side]
        print(f"  {side:8} {best[side]:6.1f} s ({rate:.1f} MB/s), and {best[side + '_start']:.1f} s to start")
    print(f"ratio {ratio:.3f} (aim: at most {AIM})")


if __name__ == "__main__":
    main()
