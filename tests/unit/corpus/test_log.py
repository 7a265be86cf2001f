"""The token log on storage: what is written is read back, the same bytes however it came in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from raydist.corpus.log import FORMAT, Documents, SliceWriter, TokenLog, held_out, open_log, token_dtype
from raydist.corpus.log_folder import LogFolder
from raydist.errors import LogError
from raydist.files import read_json, read_jsonl, write_json

FILES = ["a.txt", "b.txt"]


def some_documents(n: int, seed: int = 0, dtype: Any = np.uint16) -> Documents:
    """Documents of 0 to 40 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, n)
    return Documents(
        rng.integers(0, 60_000, lengths.sum()).astype(dtype),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(0, 256, (n, 16)).astype(np.uint8),
        rng.integers(1, 200, n),
        rng.integers(0, 2, n).astype(np.int32),
        np.arange(n, dtype=np.int64) * 7,
    )


def write_slice(log: Path, number: int, parts: list[Documents], shard_bytes: int = 2**20) -> dict[str, Any]:
    writer = SliceWriter(LogFolder(log), number, FILES, shard_bytes)
    for part in parts:
        writer.add(part)
    return writer.commit()


def write_log(path: Path, records: list[dict[str, Any]]) -> TokenLog:
    shards = [shard for record in records for shard in record["shards"]]
    totals = {key: sum(shard[key] for shard in shards) for key in ("n_documents", "n_tokens", "n_bytes")}
    same = {"format": FORMAT, "fingerprint": "f", "tokenizer": "t", "dtype": "uint16", "vocab_size": 60_000}
    counts = {"eos_token_id": 3, "n_quarantined": 0, "n_empty": 0}
    write_json(path / "manifest.json", {**same, **counts, "shards": shards, **totals})
    return open_log(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    documents = some_documents(100)
    log = write_log(tmp_path, [write_slice(tmp_path, 0, [documents])])
    (shard,) = log.shards
    assert shard.name == "00000-000.arrow" and (shard.n_documents, log.n_documents) == (100, 100)
    assert shard.tokens().dtype == np.uint16
    np.testing.assert_array_equal(shard.tokens(), documents.tokens)
    np.testing.assert_array_equal(shard.offsets(), documents.offsets)
    np.testing.assert_array_equal(shard.lengths(), np.diff(documents.offsets))
    np.testing.assert_array_equal(shard.byte_counts(), documents.n_bytes)
    first = [int.from_bytes(bytes(row[:8]), "big") for row in documents.hashes]
    assert shard.hashes().tolist() == first
    assert log.n_tokens == len(documents.tokens) and log.n_bytes == documents.n_bytes.sum()
    assert shard.xxh3_128 == xxhash.xxh3_128_hexdigest(shard.path.read_bytes())


def test_tokens_are_a_view_of_the_file(tmp_path: Path) -> None:
    log = write_log(tmp_path, [write_slice(tmp_path, 0, [some_documents(100)])])
    before = pa.total_allocated_bytes()
    tokens = log.shards[0].tokens()
    assert pa.total_allocated_bytes() == before and not tokens.flags.owndata and not tokens.flags.writeable


def test_a_shard_is_an_ordinary_arrow_file(tmp_path: Path) -> None:
    documents = some_documents(50, dtype=np.uint32)
    (shard,) = write_slice(tmp_path, 4, [documents])["shards"]
    table = pa.ipc.open_file(tmp_path / "shards" / shard["name"]).read_all()
    assert table.schema.field("input_ids").type == pa.large_list(pa.uint32())
    assert table.schema.field("hash").type == pa.binary(16)
    assert table.schema.field("file").type == pa.dictionary(pa.int32(), pa.string())
    assert (table.schema.field("n_bytes").type, table.schema.field("row").type) == (pa.int64(), pa.int64())
    assert table.column("file").to_pylist() == [FILES[i] for i in documents.files]
    content = (tmp_path / "shards" / shard["name"]).read_bytes()
    assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (shard["size"], shard["xxh3_128"])


@pytest.mark.parametrize("shard_bytes", [2**20, 3000])
def test_bytes_do_not_depend_on_how_documents_come_in(tmp_path: Path, shard_bytes: int) -> None:
    documents = some_documents(200)
    cuts = [0, 1, 2, 77, 77, 150, 200]
    pieces = [documents.part(a, b) for a, b in pairwise(cuts)]
    records = [
        write_slice(tmp_path / name, 0, parts, shard_bytes)
        for name, parts in (("whole", [documents]), ("pieces", pieces))
    ]
    assert records[0] == records[1]
    whole, cut = (
        {p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.arrow")} for n in ("whole", "pieces")
    )
    assert whole == cut and (len(whole) > 5) == (shard_bytes == 3000)


def test_shards_are_bounded_and_lose_nothing(tmp_path: Path) -> None:
    documents = some_documents(500)
    log = write_log(tmp_path, [write_slice(tmp_path, 0, [documents], 2000), write_slice(tmp_path, 1, [])])
    assert all(shard.n_tokens * 2 < 2100 for shard in log.shards)
    np.testing.assert_array_equal(np.concatenate([shard.tokens() for shard in log.shards]), documents.tokens)
    assert read_json(tmp_path / "slices/00001.json")["shards"] == []


def test_documents_from_any_start(tmp_path: Path) -> None:
    documents = some_documents(60)
    log = write_log(
        tmp_path, [write_slice(tmp_path, i, [documents.part(i * 20, i * 20 + 20)], 800) for i in range(3)]
    )
    assert len(log.shards) > 5
    for start in (0, 1, 19, 20, 35, 59, 60):
        got = list(log.documents(start))
        assert [d["row"] for d in got] == [i * 7 for i in range(start, 60)]
        for i, document in enumerate(got, start):
            a, b = documents.offsets[i : i + 2]
            np.testing.assert_array_equal(document["input_ids"], documents.tokens[a:b])
            assert document["hash"] == documents.hashes[i].tobytes()
            assert (
                document["file"] == FILES[documents.files[i]] and document["n_bytes"] == documents.n_bytes[i]
            )


def test_quarantine_stands_beside_the_slice(tmp_path: Path) -> None:
    writer = SliceWriter(LogFolder(tmp_path), 3, FILES)
    writer.add(some_documents(0), n_empty=2, bad=[{"file": "a.txt", "byte": 9, "reason": "no text"}])
    assert writer.commit() == {"shards": [], "n_quarantined": 1, "n_empty": 2}
    assert read_jsonl(tmp_path / "quarantine/00003.jsonl") == [
        {"file": "a.txt", "byte": 9, "reason": "no text"}
    ]


def test_an_unfinished_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="not complete"):
        open_log(tmp_path / "absent")
    write_slice(tmp_path, 0, [some_documents(3)])
    with pytest.raises(LogError) as caught:
        open_log(tmp_path)
    assert "1 slices are done" in caught.value.why and "raydist prepare" in caught.value.fix


def test_a_torn_shard_is_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path, [write_slice(tmp_path, 0, [some_documents(30)])])
    path = log.shards[0].path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LogError, match=r"missing or torn: 00000-000\.arrow") as caught:
        open_log(tmp_path)
    assert caught.value.where == str(path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(LogError, match=r"manifest\.json is damaged"):
        open_log(tmp_path)


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"format": FORMAT + 1})
    with pytest.raises(LogError, match="this version reads"):
        open_log(tmp_path)


def test_dtype_and_holdout_at_their_borders() -> None:
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == (np.uint16, np.uint32)
    hashes = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert held_out(hashes, 0.0).tolist() == [False] * 4 and held_out(hashes, 1.0).tolist() == [True] * 4
    assert held_out(hashes, 0.5).tolist() == [True, True, False, False]
