"""Several corpora with weights, cleaned, without duplicates, in a curriculum of block sizes: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import yaml

import raydist
from raydist.cli import main
from raydist.errors import RunError
from raydist.folder import RunFolder
from raydist.track.records import effective


def without_adverts(text: str) -> str | None:
    """None for a document that is not wanted."""
    return None if text.startswith("buy") else text


def sentence(i: int) -> str:
    return f"{i}: " + " ".join(f"word{(i * 7 + j * (i % 5 + 1)) % 90}" for j in range(12 + i % 60))


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Every third document of the second corpus, and half of the third, stand in the first one too."""
    first = [sentence(i) for i in range(300)]
    second = [sentence(i if i % 3 == 0 else i + 1000) + "   " for i in range(240)] + [
        "buy now " * 20,
        "short",
    ]
    third = [sentence(i + 150) for i in range(300)]
    pyarrow.parquet.write_table(pa.table({"text": first}), tmp_path / "first.parquet")
    (tmp_path / "second.jsonl").write_bytes(b"\n".join(orjson.dumps({"content": t}) for t in second))
    pyarrow.csv.write_csv(pa.table({"text": third}), tmp_path / "third.csv")
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    return {
        "name": "curriculum",
        "storage": str(tmp_path / "runs"),
        "model": {"config": llama, "tokenizer": {"train": {"vocab_size": 400}}},
        "corpus": {
            "sources": {
                "first": {"path": str(tmp_path / "first.parquet"), "weight": 0.5},
                "second": {"path": str(tmp_path / "second.jsonl"), "weight": 0.3, "text_column": "content"},
                "third": {"path": str(tmp_path / "third.csv"), "weight": 0.2},
            },
            "clean": ["whitespace", {"min_words": 3}, f"{__name__}:without_adverts"],
            "dedup": "exact",
            "holdout": 0.05,
            "slice_bytes": 8000,
        },
        "stages": [{"block_size": 64, "max_tokens": 15_000}, {"block_size": 128, "max_tokens": 15_000}],
        "train": {"global_batch_tokens": 1024, "lr": 3e-3, "mixed_precision": "fp32", "logging_steps": 5},
        "eval": {"eval_steps": 10, "max_tokens": 2000},
        "tracking": {"mlflow": False},
    }


@pytest.mark.slow  # each part of it has unit tests
def test_a_curriculum_over_several_corpora(
    job: dict[str, Any], tmp_path: Path, ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    planned = ended("plan", str(file))
    assert planned == 0
    told = "".join(capfd.readouterr())
    assert "15 of 64 tokens a block, then 15 of 128 tokens a block" in told
    assert "sequences each (a first guess: on a GPU the largest that fits is found" in told
    assert "words a document" in told and "are unique" in told

    assert ended("submit", str(file)) == 0
    told = "".join(capfd.readouterr())
    folder = RunFolder(Path(job["storage"]) / "curriculum")
    audit, sources = folder.data()["audit"], folder.data()["sources"]
    parts = ("n_trained", "n_held_out", "n_duplicate", "n_left")
    assert audit["n_in"] == sum(audit[part] for part in parts) and audit["n_repeated"] < audit["n_trained"]
    assert audit["n_duplicate"] > 0 and f"+ duplicate {audit['n_duplicate']:,}" in told
    assert sources["first"]["duplicate_documents"] == 0
    assert sources["second"]["n_empty"] == 2  # an advert, and one that is too short
    assert (
        70 <= sources["second"]["duplicate_documents"] <= 80 and sources["third"]["duplicate_documents"] > 130
    )
    assert 0.7 < folder.data()["unique_share"] < 0.75
    assert [of["block_size"] for of in folder.data()["packing"]] == [64, 128]
    records = effective(folder)
    assert [(r["step"], r["number"]) for r in records if r["kind"] == "stage"] == [(15, 2)]
    evals = [r["eval_loss"] for r in records if r["kind"] == "eval" and r["source"] == "first"]
    assert len(evals) == 4 and evals[-1] < evals[0]
    page = folder.report.read_text()
    assert "Stage 2 began at step 15: blocks of 128 tokens" in page and "duplicate" in page

    with pytest.raises(RunError, match="several stages"):
        raydist.blocks(folder.path, 230, 250)
    rows = raydist.blocks(folder.path, 240, 250).take_all()
    assert [(row["sample"], len(row["input_ids"])) for row in rows] == [(g, 128) for g in range(240, 250)]


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code
