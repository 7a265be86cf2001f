"""A curriculum of block sizes in one run: one schedule, one optimizer, no token lost or repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydist.feed import audit
from raydist.files import read_jsonl
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.data import open_data
from raydist.training.loop import train
from raydist.training.schedule import learning_rate
from tests.train_parts import Cut, DyingAt, losses, make_spec, run_ranks
from tests.weights import weight_hash

STAGES = [{"block_size": 16, "max_tokens": 500}, {"block_size": 32, "max_tokens": 1280}]
"""8 steps of 4 blocks of 16 tokens, then 10 of 4 of 32."""


def spec_of(folder: Path, run: str, **more: Any) -> AttemptSpec:
    return make_spec(folder, run=run, stages=STAGES, **{"train": {"max_steps": None}, **more})


def test_killed_in_any_stage_it_ends_bit_identical_and_every_token_is_accounted_for(tmp_path: Path) -> None:
    whole, cut = spec_of(tmp_path, "whole"), spec_of(tmp_path, "cut")
    result = train(whole)
    assert (result.step, result.samples) == (18, 72) == (whole.plan.steps, whole.plan.samples)
    for attempt, step in enumerate((5, 10, 15), start=1):
        with pytest.raises(Cut):
            train(replace(cut, attempt=attempt), hooks=[DyingAt(step)])
    train(replace(cut, attempt=4))
    assert weight_hash(cut.run / "model") == weight_hash(whole.run / "model")
    assert losses(cut.run) == losses(whole.run)
    records = read_jsonl(whole.run / "metrics.jsonl")
    assert [(r["step"], r["number"], r["block_size"]) for r in records if r["kind"] == "stage"] == [
        (8, 2, 32)
    ]
    rates = [r["learning_rate"] for r in records if r["kind"] == "train"]
    assert rates == [learning_rate(step, 18, whole.job.train) for step in range(18)]
    counted = audit(open_data(whole).feed, 72)
    assert counted.n_repeated == 0 and counted.n_trained == result.tokens_seen
    evals = {r["n_documents"] for r in records if r["kind"] == "eval"}
    assert len(evals) == 1


@pytest.mark.parametrize("strategy", [{"name": "zero", "stage": 2}, {"name": "fsdp"}], ids=["zero-2", "fsdp"])
def test_two_ranks_give_the_losses_of_one(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """The micro batches of a step change in number and shape in mid-run."""
    batch = {"max_steps": None, "global_batch_tokens": 128, "global_batch_size": None}
    alone = spec_of(tmp_path, "alone", train=batch)
    two = spec_of(tmp_path, "two", train=batch, strategy=strategy, world_size=2)
    assert [stage.global_batch_size for stage in two.plan.stages] == [8, 4]
    train(alone)
    run_ranks(two)
    assert losses(two.run) == pytest.approx(losses(alone.run), rel=1e-4)
