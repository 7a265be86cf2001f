"""Each bad input is one error that says what, where, why and what to do; the run's folder says failed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydist import files
from raydist.errors import BadRecords, CorpusError, EmptyCorpus, JobError, ModelError, RaydistError
from raydist.job.load import build_job
from raydist.run.run import run_job

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TEXT = "a document with a few words in it, long enough to be worth a block of its own"


def values(folder: Path, path: str, **changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "name": "bad",
        "storage": str(folder / "runs"),
        "model": {
            "config": {**CONFIG, "num_attention_heads": 2, "max_position_embeddings": 64},
            "tokenizer": {"train": {"vocab_size": 300}},
        },
        "corpus": {"sources": {"s": {"path": path}}, "holdout": 0.2},
        "packing": {"block_size": 16},
        "train": {"max_steps": 2, "global_batch_size": 2, "mixed_precision": "fp32"},
        "tracking": {"mlflow": False},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        job[section] = {**job[section], key: value}
    return job


def lines(path: Path, count: int = 30) -> Path:
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(count)))
    return path


def torn_parquet(folder: Path) -> str:
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"text": [f"{name} {i} {TEXT}" for i in range(30)]}), folder / f"{name}.parquet"
        )
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    return f"{folder}/*.parquet"


def invalid_json(folder: Path) -> str:
    path = lines(folder / "a.jsonl")
    path.write_text(path.read_text() + '{"text": "cut off\n')
    return str(path)


def invalid_utf8(folder: Path) -> str:
    path = lines(folder / "a.jsonl")
    path.write_bytes(path.read_bytes() + b'{"text": "\xff\xfe"}\n')
    return str(path)


def truncated_gzip(folder: Path) -> str:
    packed = gzip.compress(lines(folder / "a.jsonl", 3000).read_bytes())
    (folder / "a.jsonl").unlink()
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    return str(folder / "a.jsonl.gz")


def null_and_number(folder: Path) -> str:
    path = lines(folder / "a.jsonl")
    path.write_text(path.read_text() + '{"text": null}\n{"text": 42}\n')
    return str(path)


BAD_RECORDS = {
    torn_parquet: ("b.parquet", 30, 1),
    invalid_json: ("invalid JSON", 30, 1),
    invalid_utf8: ("invalid UTF-8", 30, 1),
    truncated_gzip: ("a.jsonl.gz", None, 1),
    null_and_number: ("null", 30, 2),
}


@pytest.mark.parametrize("make", BAD_RECORDS, ids=lambda make: make.__name__)
def test_unreadable_records_stop_a_run_and_are_listed_in_quarantine(
    make: Callable[[Path], str], tmp_path: Path, ray_local: None
) -> None:
    said, n_good, n_bad = BAD_RECORDS[make]
    job = values(tmp_path, make(tmp_path))
    with pytest.raises(BadRecords) as caught:
        run_job(build_job(job))
    assert said in str(caught.value) and "quarantine" in caught.value.fix
    status = files.read_json(tmp_path / "runs/bad/status.json")
    assert status["state"] == "failed" and said in status["error"]
    assert not (tmp_path / "runs/bad/metrics.jsonl").exists()

    from raydist import prepare

    job["corpus"]["on_error"] = "quarantine"
    (log,) = prepare(build_job(job)).logs.values()
    assert log.n_quarantined == n_bad
    assert n_good is None or log.n_documents == n_good
    listed = files.read_jsonl(log.path / "quarantine.jsonl")
    assert len(listed) == n_bad and all(record["reason"] and record["file"] for record in listed)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"corpus__sources": {"s": {"path": "nowhere/a.jsonl"}}}, CorpusError, "nowhere"),
        ({"corpus__sources": {"s": {"path": "nowhere/*.jsonl"}}}, CorpusError, "nowhere"),
        ({"packing__block_size": 128}, JobError, "block_size 128 is above the model's 64 positions"),
        ({"corpus__clean": [{"min_words": 1000}]}, EmptyCorpus, "document"),
        ({"corpus__holdout": 0.999999}, EmptyCorpus, "holdout"),
        ({"corpus__clean": ["whitspace"]}, JobError, "whitespace"),
        ({"model__tokenizer": "nowhere/tokenizer"}, ModelError, "nowhere/tokenizer"),
        ({"model__config": {**CONFIG, "num_heads": 3}}, JobError, "num_heads"),
        ({"train__global_batch_size": 0}, JobError, "train.global_batch_size"),
    ],
)
def test_what_cannot_be_run_says_why(
    change: dict[str, Any], error: type[RaydistError], said: str, tmp_path: Path, ray_local: None
) -> None:
    path = str(lines(tmp_path / "a.jsonl"))
    with pytest.raises(error) as caught:
        run_job(build_job(values(tmp_path, path, **change)))
    assert said in str(caught.value) and caught.value.fix
    status = tmp_path / "runs/bad/status.json"
    assert change == {"train__global_batch_size": 0} or files.read_json(status)["state"] == "failed"


UNKNOWN_KEY = {"zero_optimization": {"overlap_com": True}}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"adapter": {"target_modules": ["q_proj", "qkv"]}}, ModelError, "no linear module named qkv"),
        (
            {"adapter": {"target_modules": "qkv"}, "quantization": "int4"},
            ModelError,
            "k_proj, lm_head, o_proj",
        ),
        ({"strategy": {"name": "zero", "stage": 2, "config": UNKNOWN_KEY}}, JobError, "overlap_com: Extra"),
        ({"packing": {"block_size": 128}}, JobError, "above the model's 64 positions"),
    ],
)
def test_what_the_model_or_deepspeed_refuses_is_told_before_anything_starts(
    change: dict[str, Any], error: type[RaydistError], said: str, tmp_path: Path
) -> None:
    """Without a Ray, and before a token is made."""
    config = {**CONFIG, "num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": 300}
    files.write_json(tmp_path / "base" / "config.json", config)
    job = {
        **values(tmp_path, str(lines(tmp_path / "a.jsonl"))),
        "model": {"base": str(tmp_path / "base")},
        **change,
    }
    with pytest.raises(error) as caught:
        run_job(build_job(job))
    assert said in str(caught.value) and caught.value.fix
    assert files.read_json(tmp_path / "runs/bad/status.json")["state"] == "failed"
    assert not (tmp_path / "runs" / "tokens").exists()


def test_a_missing_column_names_those_that_exist(tmp_path: Path, ray_local: None) -> None:
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError) as caught:
        run_job(build_job(values(tmp_path, str(tmp_path / "a.parquet"))))
    assert "content" in str(caught.value) and "text" in caught.value.what


def test_an_empty_corpus_is_refused(tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(EmptyCorpus):
        run_job(build_job(values(tmp_path, str(tmp_path / "a.jsonl"))))
