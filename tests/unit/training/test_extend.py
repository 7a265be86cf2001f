"""A finished run goes on: with its corpus as one longer run, with another one nothing is read twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydist.feed import audit
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.job.plan import Mix, make_plan
from raydist.job.schema import Job
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import newest_valid
from raydist.training.data import open_data
from raydist.training.hooks import Hook
from raydist.training.loop import Attempt, train
from raydist.training.schedule import learning_rate, planned_rate
from tests.train_parts import Cut, DyingAt, losses, make_job, make_spec, run_ranks, write_log
from tests.weights import weight_hash

STEP_TOKENS = 4 * 32
FLAT = {"max_steps": 8, "scheduler": "constant", "warmup_ratio": 0.0}
MORE = {"max_tokens": 5 * STEP_TOKENS}
SOURCES = {"random": {"path": "random.txt", "weight": 0.25}, "new": {"path": "new.txt", "weight": 0.75}}
MIXES = (Mix(0, {"random": None}), Mix(32, {"random": 0.25, "new": 0.75}))


def extended(spec: AttemptSpec, extend: Any, **corpus: Any) -> AttemptSpec:
    """The next attempt, under the job that extends the run; corpus: keys of it, with SOURCES."""
    values = spec.job.model_dump()
    values["train"]["extend"] = extend
    logs, mixes = dict(spec.logs), ()
    if corpus:
        values["corpus"] |= corpus
        path = spec.run.parent / "tokens" / "new"
        logs["new"], mixes = path if path.exists() else write_log(path, seed=5), MIXES
    job = Job.model_validate(values)
    plan = make_plan(job, spec.plan.world_size, None)
    return replace(spec, job=job, plan=plan, logs=logs, mixes=mixes, attempt=spec.attempt + 1)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == kind]


def test_with_the_same_corpus_it_is_one_run_of_the_whole_length(tmp_path: Path) -> None:
    whole = make_spec(tmp_path, run="whole", train={**FLAT, "max_steps": 13})
    first = make_spec(tmp_path, run="first", train=FLAT)
    train(whole)
    train(first)
    result = train(extended(first, {**MORE, "rewarm": False}))
    assert (result.step, result.samples) == (13, 52)
    assert losses(first.run) == losses(whole.run)
    assert weight_hash(first.run / "model") == weight_hash(whole.run / "model")
    (segment,) = records(first.run, "segment")
    assert (segment["step"], segment["steps"], segment["optimizer"]) == (8, 5, "kept")
    assert [r["step"] for r in records(first.run, "commit")] == [5, 8, 10, 13]
    assert "forgotten" not in newest_valid(RunFolder(first.run)).path.joinpath("COMMIT.json").read_text()


def test_a_source_joins_and_weights_change_killed_and_resumed_it_ends_bit_identical(tmp_path: Path) -> None:
    whole, cut = (make_spec(tmp_path, run=run, train={"max_steps": 8}) for run in ("whole", "cut"))
    extend = [MORE, {**MORE, "optimizer": "reset"}]
    train(whole)
    train(cut)
    result = train(extended(whole, extend, sources=SOURCES))
    attempt = extended(cut, extend, sources=SOURCES)
    for number, step in enumerate((10, 13, 15), start=2):
        with pytest.raises(Cut):
            train(replace(attempt, attempt=number), hooks=[DyingAt(step)])
    train(replace(attempt, attempt=5))
    assert losses(cut.run) == losses(whole.run)
    assert weight_hash(cut.run / "model") == weight_hash(whole.run / "model")
    assert newest_valid(RunFolder(cut.run)).forgotten == 13
    counted = audit(open_data(attempt).feed, 72)
    assert counted.n_trained + counted.n_repeated == result.tokens_seen
    evals = [(r["step"], r["source"]) for r in records(whole.run, "eval")]
    assert evals.count((8, "random")) == 1 and (8, "new") in evals and (0, "new") not in evals
    rates = {r["step"]: r["learning_rate"] for r in records(whole.run, "train")}
    job = attempt.job.train
    assert [rates[step + 1] for step in range(8, 13)] == [learning_rate(step, 5, job) for step in range(5)]
    assert rates[9] > rates[8] and rates[14] > rates[13]


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "ddp"},
        pytest.param({"name": "fsdp"}, marks=pytest.mark.slow),
        pytest.param({"name": "zero", "stage": 2}, marks=pytest.mark.slow),
        pytest.param({"name": "zero", "stage": 3}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "zero-2", "zero-3"],
)
def test_two_ranks_give_the_losses_of_one(tmp_path: Path, strategy: dict[str, Any]) -> None:
    alone = make_spec(tmp_path, run="alone", train={"max_steps": 8})
    two = make_spec(tmp_path, run="two", train={"max_steps": 8}, strategy=strategy, world_size=2)
    for spec, run in ((alone, train), (two, run_ranks)):
        run(spec)
        run(extended(spec, {**MORE, "optimizer": "reset"}, sources=SOURCES))
    assert losses(two.run) == pytest.approx(losses(alone.run), rel=1e-4)


def test_a_reset_optimizer_is_one_that_took_no_step(tmp_path: Path) -> None:
    kept, reset = (make_spec(tmp_path, run=run, train=FLAT) for run in ("kept", "reset"))
    state: dict[str, list[float]] = {}

    class Look(Hook):
        def on_step(self, attempt: Attempt, result: Any) -> None:
            if attempt.step == 9:
                values = attempt.strategy.optimizer.state.values()  # type: ignore[attr-defined]
                state[attempt.folder.path.name] = [float(each["step"]) for each in values]

    for spec in (kept, reset):
        train(spec)
        name = spec.run.name.replace("kept", "keep")
        train(extended(spec, {**MORE, "rewarm": False, "optimizer": name}), hooks=[Look()])
    assert set(state["kept"]) == {9.0} and set(state["reset"]) == {1.0}
    assert losses(kept.run)[9] == losses(reset.run)[9] and losses(kept.run)[10] != losses(reset.run)[10]


def test_the_learning_rate_is_re_warmed_or_stays(tmp_path: Path) -> None:
    extend = [{**MORE, "rewarm": False}, {"max_tokens": 20 * STEP_TOKENS}]
    job = make_job(
        tmp_path, train={"max_steps": 10, "min_lr_ratio": 0.1, "warmup_ratio": 0.2, "extend": extend}
    )
    plan, lr = make_plan(job, 1, None), job.train.lr
    assert plan.steps == 35 and plan.samples == 140 and plan.starts == {0, 10, 15}
    rates = [planned_rate(step, plan, job.train) for step in range(35)]
    assert rates[:10] == [learning_rate(step, 10, job.train) for step in range(10)]
    assert rates[10:15] == pytest.approx([0.1 * lr] * 5)
    assert rates[15:] == [learning_rate(step, 20, job.train) for step in range(20)]
    assert max(rates[15:]) == lr and rates[15] < 0.3 * lr
