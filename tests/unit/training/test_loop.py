"""The loop against a plain PyTorch loop, and against itself cut in two."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.errors import CheckpointError, TrainingError
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.training import checkpoint
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit
from raydist.training.data import Data, open_data
from raydist.training.hooks import Hook, StopOnRequest
from raydist.training.loop import Attempt, train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    Cut,
    finish,
    losses,
    make_job,
    make_spec,
    plain_losses,
    run_ranks,
    start_ranks,
    write_log,
)
from tests.weights import weight_hash

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_for_loss_it_is_a_plain_loop(tmp_path: Path, world_size: int) -> None:
    spec = make_spec(tmp_path, world_size=world_size, train={"global_batch_size": 5})
    assert spec.plan.accumulation_steps == {1: 5, 2: 3}[world_size]
    if world_size == 1:
        train(spec)
    else:
        run_ranks(spec)
    expected, found = plain_losses(spec), losses(spec.run)
    assert list(found) == list(range(1, 21))
    assert [found[step] for step in found] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.8 * expected[0]
    norms = [r["grad_norm"] for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "train"]
    assert max(norms) > spec.job.train.max_grad_norm  # or clipping was not tested


def cut_after(spec: AttemptSpec, steps: int) -> Data:
    """The spec's data, in which the process dies before the step after `steps`."""
    data = open_data(spec)

    class Dying:
        fingerprint, fingerprint_at = data.feed.fingerprint, data.feed.fingerprint_at
        complete = True

        def loader(self, rank: int, world_size: int, start: int, stop: int, **sizes: Any) -> Any:
            for step in data.feed.loader(rank, world_size, start, stop, **sizes):
                if step.start >= steps * spec.plan.global_batch_size:
                    raise Cut
                yield step

    return Data(Dying(), data.eval_sets)  # type: ignore[arg-type]


def test_resumed_anywhere_it_ends_bit_identical(tmp_path: Path) -> None:
    whole = make_spec(tmp_path, run="whole", checkpoint={"asynchronous": False})
    cut = replace(whole, run=tmp_path / "cut")
    train(whole)
    for attempt, steps in enumerate((2, 7, 18), start=1):
        with pytest.raises(Cut):
            train(replace(cut, attempt=attempt), data=cut_after(cut, steps))
    result = train(replace(cut, attempt=4))
    assert weight_hash(cut.run / "model") == weight_hash(whole.run / "model")
    assert losses(cut.run) == losses(whole.run)
    assert (result.step, result.samples, result.stopped) == (20, 80, False)
    kinds = [
        (r["kind"], r["step"])
        for r in read_jsonl(cut.run / "metrics.jsonl")
        if r["kind"] in ("start", "resume")
    ]
    assert kinds == [("start", 0), ("start", 0), ("resume", 5), ("resume", 15)]
    assert ledger_total(cut.run) == ledger_total(whole.run)


def test_the_start_says_which_attention_was_taken_and_why_not_a_faster_one(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 1}, run="plain")
    train(spec)
    start = read_jsonl(spec.run / "metrics.jsonl")[0]
    assert (start["attention"], start["attention_passed_over"]) == ("raydist_per_document", {})
    assert start["logits"] == "in parts if they are many"
    windowed = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
    spec = make_spec(tmp_path, train={"max_steps": 1}, run="windowed", model={"config": windowed})
    train(spec)
    start = read_jsonl(spec.run / "metrics.jsonl")[0]
    assert start["attention"] == "sdpa"
    assert "see a window" in start["attention_passed_over"]["raydist_per_document"]


def ledger_total(run: Path) -> dict[str, int]:
    """Tokens of the ledger lines that lead to the newest commit, as an auditor would add them."""
    lines = {line["id"]: line for line in read_jsonl(run / "ledger.jsonl")}
    newest = next(checkpoint.commits(RunFolder(run)))
    total, line, step = (
        dict.fromkeys(("tokens", "eos", "padding", "bos"), 0),
        lines[newest.ledger],
        newest.step,
    )
    while True:
        total = {name: n + line.get(name, 0) for name, n in total.items()}
        assert line["steps"][1] == step
        step = line["steps"][0]
        if line["previous"] is None:
            break
        line = lines[line["previous"]]
    assert step == 0
    assert total == vars(newest.seen)
    return total


def test_two_ranks_resume_bit_identical_and_one_rank_goes_on_from_two(tmp_path: Path) -> None:
    whole = make_spec(tmp_path, world_size=2, run="whole")
    run_ranks(whole)
    for name in ("again", "alone"):
        shutil.copytree(whole.run, tmp_path / name)
        shutil.rmtree(tmp_path / name / "model")
        for step in (15, 20):
            shutil.rmtree(RunFolder(tmp_path / name).checkpoint(step))
    run_ranks(replace(whole, run=tmp_path / "again", attempt=2))
    assert weight_hash(tmp_path / "again" / "model") == weight_hash(whole.run / "model")
    single = replace(make_spec(tmp_path, world_size=1), run=tmp_path / "alone", attempt=2)
    result = train(single)
    assert losses(single.run) == pytest.approx(losses(whole.run), rel=1e-4)
    assert result.tokens_seen == ledger_total(whole.run)["tokens"]


def test_what_it_counts_is_what_the_feed_counts(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    result = train(spec)
    counts = open_data(spec).feed.counts(0, spec.plan.samples)
    assert ledger_total(spec.run) == {
        "tokens": counts.n_tokens,
        "eos": counts.n_eos,
        "padding": counts.n_padding,
        "bos": counts.n_bos,
    }
    assert result.tokens_seen == counts.n_tokens


class Keeping(Hook):
    def __init__(self, commits: list[Commit]) -> None:
        self._commits = commits

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        self._commits.append(commit)


def test_it_evaluates_at_the_start_regularly_and_at_the_end(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 7}, eval={"eval_steps": 3}, checkpoint={"save_steps": 5})
    commits: list[Commit] = []
    result = train(spec, hooks=[Keeping(commits)])
    evals = [r for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in evals] == [0, 3, 6, 7]
    assert evals[0]["perplexity"] == pytest.approx(VOCABULARY, rel=0.1)
    assert result.evals["random"]["eval_loss"] == evals[-1]["eval_loss"] < evals[0]["eval_loss"]
    assert [(c.step, bool(c.evals)) for c in commits] == [(5, False), (7, True)]


def test_a_stop_is_a_checkpoint_and_a_clean_end(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    asked = iter([False, False, True])
    result = train(spec, hooks=[StopOnRequest(lambda: next(asked))])
    assert (result.stopped, result.step) == (True, 3)
    assert not (spec.run / "model").exists()
    assert checkpoint.newest_valid(RunFolder(spec.run)).step == 3  # type: ignore[union-attr]
    (spec.run / "stop").touch()
    assert train(replace(spec, attempt=2)).step == 4
    (spec.run / "stop").unlink()
    assert train(replace(spec, attempt=3)).stopped is False
    assert (spec.run / "model").is_dir()


def test_sigterm_stops_all_ranks_after_a_checkpoint(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, world_size=2, train={"max_steps": 100_000}, eval={"eval_steps": 100_000})
    ranks = start_ranks(spec)
    while 3 not in losses(spec.run):
        time.sleep(0.05)
    ranks[0].terminate()
    finish(ranks)
    found = checkpoint.newest_valid(RunFolder(spec.run))
    assert found is not None
    assert found.step == max(losses(spec.run)) >= 3


def test_a_loss_that_is_no_number_ends_it_and_says_where(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"lr": 1e30, "max_grad_norm": None})
    with pytest.raises(TrainingError, match=r"step \d+: the gradient norm is (nan|inf)"):
        train(spec)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    train(make_spec(tmp_path, train={"max_steps": 5}))
    with pytest.raises(CheckpointError, match="other data"):
        train(make_spec(tmp_path, attempt=2, seed=8))


def test_gradient_checkpointing_and_bf16_train_alike(tmp_path: Path) -> None:
    plain = make_spec(tmp_path, run="plain", train={"max_steps": 5})
    saving = make_spec(tmp_path, run="saving", train={"max_steps": 5, "gradient_checkpointing": True})
    halved = make_spec(tmp_path, run="halved", train={"max_steps": 5, "mixed_precision": "bf16"})
    for spec in (plain, saving, halved):
        train(spec)
    assert losses(saving.run) == pytest.approx(losses(plain.run), rel=1e-6)
    assert losses(halved.run) == pytest.approx(losses(plain.run), rel=2e-2)
    assert losses(halved.run) != losses(plain.run)


def test_what_is_learned_and_forgotten_is_recorded_also_after_a_resume(tmp_path: Path) -> None:
    source = {"path": "random.txt"}
    spec = make_spec(
        tmp_path,
        corpus={"sources": {"new": {**source}, "known": {**source, "replay": True}}, "holdout": 0.1},
        train={"max_steps": 8},
        eval={"eval_steps": 4},
        checkpoint={"save_steps": 4},
    )
    assert spec.job.corpus.weights == {"new": 0.95, "known": 0.05}
    log = spec.logs["random"]
    spec = replace(spec, logs={"new": log, "known": write_log(tmp_path / "tokens" / "known", seed=1)})
    assert train(spec, hooks=[StopOnRequest(iter([False] * 4 + [True] * 9).__next__)]).stopped
    train(replace(spec, attempt=2))
    evals = [r for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "eval"]
    before = {r["source"]: r["eval_loss"] for r in evals if r["step"] == 0}
    assert len(before) == 2 and [r["step"] for r in evals] == [0, 0, 4, 4, 8, 8]
    for record in evals[2:]:
        change = record["eval_loss"] - before[record["source"]]
        name, sign = ("gain", -1) if record["source"] == "new" else ("forgetting", 1)
        assert record[name] == sign * change and not {"gain", "forgetting"} - {name} & record.keys()


def test_the_best_evaluation_is_kept_and_exported(tmp_path: Path) -> None:
    """A rate that destroys the model at its end: the last weights are not the best."""
    spec = make_spec(
        tmp_path,
        train={"max_steps": 12, "scheduler": "constant", "lr": 0.3},
        eval={"eval_steps": 2},
        checkpoint={"save_steps": 6, "save_total_limit": 1, "load_best_model_at_end": True},
    )
    train(spec)
    best = checkpoint.best(RunFolder(spec.run))
    evals = {r["step"]: r["eval_loss"] for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "eval"}
    trained = {step: loss for step, loss in evals.items() if step}
    assert best is not None
    assert best.eval_loss == min(trained.values())
    assert best.step < 12
    assert {c.step for c in checkpoint.commits(RunFolder(spec.run))} == {best.step, 12}
    stored = RunFolder(spec.run).checkpoint(best.step) / "shard-00001-model-00001-of-00001.safetensors"
    from safetensors.torch import load_file

    exported, expected = load_file(spec.run / "model" / "model.safetensors"), load_file(stored)
    assert all(torch.equal(exported[name], expected[name]) for name in exported)


def test_an_evaluation_and_a_checkpoint_after_each_epoch(tmp_path: Path) -> None:
    sections = {
        "train": {"max_steps": None, "epochs": 2},
        "checkpoint": {"save_steps": "epoch"},
        "eval": {"eval_steps": "epoch"},
    }
    once = open_data(make_spec(tmp_path)).feed.samples_per_epoch
    assert once is not None and once % 4  # the end of an epoch is within a step
    job = make_job(tmp_path, **sections)
    spec = replace(make_spec(tmp_path), job=job, plan=make_plan(job, 1, once))
    train(spec)
    ends = [-(-once // 4), -(-2 * once // 4)]
    records = read_jsonl(spec.run / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "commit"] == ends
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, *ends]
