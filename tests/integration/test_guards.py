"""A corpus with noise in it, from raw text to a report: skipped, named, shown, accounted for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.track.records import effective
from raydist.training.checkpoint import newest_valid
from tests.whole_run import CONFIG, SENTENCE, folder_of, submit, write_corpus

Command = Callable[..., tuple[int, str]]


def write_poisoned(folder: Path) -> None:
    """b.jsonl is noise: letters in an order of their own."""
    folder.mkdir()
    write_corpus(folder / "a.jsonl", 2200)
    write_corpus(folder / "c.jsonl", 1200)
    drawn = random.Random(0)
    letters = [*SENTENCE]
    noise = ("".join(drawn.choices(letters, k=600)) for _ in range(20))
    (folder / "b.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in noise))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    folder = tmp_path_factory.mktemp("guards")
    write_poisoned(folder / "text")
    job: dict[str, Any] = {
        "name": "guarded",
        "storage": str(folder / "runs"),
        "model": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {
            "sources": {"words": {"path": str(folder / "text")}},
            "holdout": 0.05,
            "slice_bytes": 12_000,  # about that of b.jsonl
        },
        "packing": {"block_size": 128, "window_shards": 1},
        "train": {"max_steps": 110, "global_batch_size": 8, "lr": 6e-3, "mixed_precision": "fp32"},
        "scaling": {"num_workers": 2},
        "checkpoint": {"save_steps": 20},
        "eval": {"eval_steps": 110, "max_tokens": 2000},
        "guards": {"mode": "on", "window": 40},
    }
    code, output = submit(job)
    assert code == 0, output
    return folder_of(job), output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_noise_is_skipped_and_every_reader_of_the_run_knows(
    poisoned: tuple[RunFolder, str], command: Command
) -> None:
    folder, printed = poisoned
    found = [r for r in effective(folder) if r["kind"] == "skip"]
    named = {Path(d["file"]).name for r in found if r["stand_out"] for d in r["documents"]}
    assert named == {"b.jsonl"}
    newest = newest_valid(folder)
    assert newest is not None and newest.skipped.steps == len(found)
    audit = folder.data()["audit"]
    parts = ("n_trained", "n_held_out", "n_duplicate", "n_skipped", "n_left")
    assert audit["n_in"] == sum(audit[part] for part in parts)
    assert audit["n_skipped"] == newest.skipped.tokens > 0
    lines = read_jsonl(folder.ledger_file)
    assert sum(line["tokens"] for line in lines) == audit["n_trained"] + audit["n_repeated"]
    assert f"+ skipped {audit['n_skipped']:,} + left" in printed and "was skipped: the loss" in printed
    step = found[0]["step"]
    code, shown = command("show", str(folder.path), "--step", str(step))
    assert code == 0 and f"step {step} was skipped: {found[0]['reason']}" in shown and "b.jsonl, row" in shown
    good = orjson.loads(command("show", str(folder.path), "--step", "1", "--json")[1])
    assert {sample["bad"] for sample in good} == {""}
    assert "Bad steps" in folder.report.read_text()
    assert command("verify", str(folder.path))[0] == 0
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder.path.parent.resolve()}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics["skipped_steps"] == len(found)
    assert run.data.metrics["skipped_samples"] == newest.skipped.samples
