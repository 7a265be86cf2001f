"""A real pretrained model and real text, in the folder that RAYDIST_REAL names.

It holds smollm2-135m/, prose/*.parquet, a slice of the same text as prose.jsonl.gz, prose.csv,
prose.json and prose.txt (a document per line, newlines as spaces), and heldout.jsonl.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raydist
from raydist.corpus.log import TokenLog
from raydist.folder import RunFolder
from raydist.job.load import build_job

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("RAYDIST_REAL" not in os.environ, reason="RAYDIST_REAL names no folder"),
]
REAL = Path(os.environ.get("RAYDIST_REAL", "."))
JOBS = Path(__file__).parents[2] / "jobs"


def values(storage: Path, path: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "real",
        "storage": str(storage),
        "model": {"base": str(REAL / "smollm2-135m")},
        "corpus": {"sources": {"prose": {"path": str(REAL / path)}}, "holdout": 0},
        "packing": {"block_size": 256},
        "train": {
            "max_steps": 36,
            "global_batch_size": 8,
            "lr": 1e-4,
            "mixed_precision": "fp32",
            "logging_steps": 2,
        },
        **more,
    }


def log_of(storage: Path, path: str, clean: list[Any] | None = None) -> TokenLog:
    job = values(storage, path)
    job["corpus"]["clean"] = clean or []
    (log,) = raydist.prepare(build_job(job)).logs.values()
    return log


def documents(log: TokenLog) -> dict[bytes, list[int]]:
    return {document["hash"]: document["input_ids"].tolist() for document in log.documents()}


def test_the_same_text_in_every_format_gives_the_same_tokens(tmp_path: Path, ray_local: None) -> None:
    expected = documents(log_of(tmp_path, "prose.jsonl.gz"))
    assert len(expected) > 1900
    for name in ("prose.csv", "prose.json"):
        assert documents(log_of(tmp_path, name)) == expected, name
    everything = documents(log_of(tmp_path, "prose"))
    assert {digest: everything[digest] for digest in expected} == expected
    lines = [{"characters": {"pattern": "\n", "replacement": " "}}]
    assert documents(log_of(tmp_path, "prose.txt")) == documents(log_of(tmp_path, "prose.json", lines))


@pytest.mark.slow
def test_a_few_dozen_steps_lower_held_out_perplexity(tmp_path: Path, ray_local: None) -> None:
    import torch

    held_out = {
        "eval_steps": 36,
        "max_tokens": 8000,
        "sources": {"heldout": {"path": str(REAL / "heldout.jsonl")}},
    }
    job = values(tmp_path, "prose", scaling={"num_workers": 2}, eval=held_out)
    result = raydist.train(build_job(job))
    from raydist.track.records import effective

    first, last = (r["perplexity"] for r in effective(RunFolder(result.folder)) if r["kind"] == "eval")
    assert last < 0.8 * first
    logits = result.load_model()(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_qlora_by_the_command_line_lowers_perplexity_and_merges(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from raydist.model.export import load_trained
    from raydist.track.records import effective

    sets = {
        "storage": tmp_path,
        "model.base": REAL / "smollm2-135m",
        "corpus.sources": f"{{prose: {{path: {REAL / 'prose'}}}}}",
        "packing.block_size": 256,
        "train.max_tokens": "null",
        "train.max_steps": 10,
        "train.global_batch_size": 4,
        "train.lr": 1e-3,
        "train.gradient_checkpointing": "false",
        "scaling.num_workers": 1,
        "scaling.cpus_per_worker": 2,
        "eval.max_tokens": 2000,
        "eval.sources": f"{{heldout: {{path: {REAL / 'heldout.jsonl'}}}}}",
    }
    raydist_("submit", str(JOBS / "qlora.yaml"), *(f"--set={key}={value}" for key, value in sets.items()))
    run = tmp_path / "qlora"
    held_out = [r for r in effective(RunFolder(run)) if r["kind"] == "eval" and r["source"] == "heldout"]
    assert held_out[-1]["perplexity"] < 0.8 * held_out[0]["perplexity"]

    told = raydist_("export", str(run), "--merge")
    assert told == f"merged model in {run / 'export' / 'merged'}\n"
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    ids = torch.arange(1000, 1200).unsqueeze(0)
    with torch.inference_mode():
        found, expected = merged(ids).logits, load_trained(run / "model")(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def raydist_(*arguments: str) -> str:
    """What the command line prints; it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raydist", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
