"""Training that begins with the first window of shards, while the rest of the log is being made."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raydist.errors import CorpusError, LogError, RaydistError
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.plan import make_plan
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import find_prepared
from raydist.run.run import run_job
from raydist.track.records import effective
from raydist.training.loop import train
from tests.integration.test_sweep import CONFIG
from tests.weights import weight_hash
from tests.whole_run import losses, write_corpus

GATE = Path(os.environ["RAY_TMPDIR"], "follow")
"""Names the storage whose preparation is held up; the tasks of Ray see it too."""


def patiently(text: str) -> str:
    """A cleaning step: once the first window is there, it waits until training has begun."""
    storage = Path(GATE.read_text())
    first = "tokens/*/slices/0000[01].json"  # not any two: later ones may be done before them
    while len(list(storage.glob(first))) == 2 and not list(storage.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    return text


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Some fifteen slices, and windows of two: each window of the log is made by itself."""
    folder = tmp_path_factory.mktemp("follow")
    write_corpus(folder / "text.jsonl", 200)
    return {
        "name": "follows",
        "storage": str(folder),
        "model": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {
            "sources": {"words": {"path": str(folder / "text.jsonl")}},
            "slice_bytes": 4000,
            "clean": [f"{__name__}:patiently"],
        },
        "packing": {"block_size": 64, "window_shards": 2},
        "train": {"max_steps": 40, "global_batch_size": 8, "lr": 3e-3, "mixed_precision": "fp32"},
        "eval": {"eval_steps": 20, "max_tokens": 2000, "sources": {}},
        "scaling": {"cpus_per_worker": 1},  # or training would take the CPUs that preparing needs meanwhile
        "tracking": {"mlflow": False},
    }


def test_a_growing_log_gives_the_samples_of_a_finished_one(job: dict[str, Any], ray_local: None) -> None:
    GATE.write_text(job["storage"])
    run_job(build_job(job))
    grown, whole = (RunFolder(Path(job["storage"], name)) for name in ("follows", "whole"))
    prepared = find_prepared(build_job(job), grown.data()["pins"])
    train(attempt_spec(prepared, whole, make_plan(build_job(job), 1, None), 1))
    (log,) = Path(job["storage"], "tokens").iterdir()
    records = effective(grown)
    assert records[0]["time"] < (log / "manifest.json").stat().st_mtime  # it began before the log was whole
    assert any("still growing" in r.get("what", "") for r in records)
    assert losses(grown) == losses(whole) and weight_hash(grown.model) == weight_hash(whole.model)
    last = [[r for r in effective(run) if r["kind"] == "eval"][-1] for run in (grown, whole)]
    assert last[0]["step"] == 40 and last[0]["eval_loss"] == last[1]["eval_loss"]


def test_files_that_vanish_meanwhile_end_the_run_and_its_workers(
    job: dict[str, Any], ray_local: None, tmp_path: Path
) -> None:
    GATE.write_text(str(tmp_path))
    source = tmp_path / "text.jsonl"
    source.write_bytes(Path(job["storage"], "text.jsonl").read_bytes())
    corpus = {**job["corpus"], "sources": {"words": {"path": str(source)}}}
    folder = RunFolder(tmp_path / "torn")

    def remove_once_it_trains() -> None:
        while not folder.metrics_file.exists():
            time.sleep(0.05)
        source.write_bytes(b"")

    threading.Thread(target=remove_once_it_trains, daemon=True).start()
    with pytest.raises(RaydistError) as told:
        run_job(build_job({**job, "name": "torn", "storage": str(tmp_path), "corpus": corpus}))
    assert isinstance(told.value, CorpusError | LogError) and "text.jsonl" in str(told.value)
    assert folder.status()["state"] == "failed" and not folder.model.exists()
    with folder.writer(2):  # rank 0 gave it back: it does not wait for tokens that nobody makes
        pass
