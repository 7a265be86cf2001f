"""Which parameters each trial has: a function of its number, or of what earlier trials showed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raydist.errors import JobError, RunError
from raydist.files import cut_torn_line
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.schema import Job
from raydist.job.search import trial_job
from raydist.sweep.suggest import METRIC, Journal, read_parameters

LR = {"train.lr": {"loguniform": [1e-5, 1e-2]}}
GRID = {"train.lr": {"grid": [1e-3, 1e-4]}, "packing.block_size": {"grid": [64, 128, 256]}}


def sweep(search: dict[str, Any], **more: Any) -> Job:
    tune = {"search": search, **more}
    return build_job(
        {
            "name": "s",
            "model": {"config": {"model_type": "llama"}, "tokenizer": {"train": {"vocab_size": 512}}},
            "corpus": {"sources": {"words": {"path": "words.txt"}}},
            "train": {"max_tokens": 1e6},
            "tune": tune,
        }
    )


def suggested(job: Job, path: Path, count: int) -> list[dict[str, Any]]:
    """Of so many trials; each ends, the better the higher its learning rate."""
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    file, journal = folder.trials_file, Journal(job, folder)
    for number in range(count):
        config = journal.suggest(f"t{number}")
        if isinstance(config, str):
            break
        assert config == {"number": number}
        lr = read_parameters(file)[number]["train.lr"]
        journal.on_trial_complete(f"t{number}", {METRIC: 3 - 100 * lr, "tokens": 1e6})
    return read_parameters(file)


def test_random_trials_depend_on_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    job = sweep(LR, trials=6)
    drawn = suggested(job, tmp_path / "a", 6)
    assert len({p["train.lr"] for p in drawn}) == 6 and all(1e-5 <= p["train.lr"] <= 1e-2 for p in drawn)
    assert suggested(job, tmp_path / "b", 3) == drawn[:3] and suggested(job, tmp_path / "b", 6) == drawn
    other = job.model_copy(update={"seed": 1})
    assert suggested(other, tmp_path / "c", 6) != drawn


def test_a_grid_is_gone_through_once_and_ends(tmp_path: Path) -> None:
    drawn = suggested(sweep(GRID), tmp_path / "a", 99)
    assert [tuple(p.values()) for p in drawn] == [(lr, b) for lr in (1e-3, 1e-4) for b in (64, 128, 256)]


def test_a_grid_is_combined_with_what_is_drawn(tmp_path: Path) -> None:
    search = {"packing.block_size": {"grid": [64, 128]}, **LR}
    drawn = suggested(sweep(search, trials=5), tmp_path / "a", 9)
    assert [p["packing.block_size"] for p in drawn] == [64, 128, 64, 128, 64]
    assert len({p["train.lr"] for p in drawn}) == 5


MIXED = {**LR, "train.optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]]}}


def test_optuna_learns_and_a_resumed_sweep_proposes_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    job = sweep(MIXED, trials=30, searcher="optuna")
    undisturbed = suggested(job, tmp_path / "a", 30)
    assert len({p["train.lr"] for p in undisturbed}) == 30
    late, early = (sum(p["train.lr"] for p in of) / 10 for of in (undisturbed[20:], undisturbed[:10]))
    assert late > 2 * early  # the first ten are drawn blindly
    for after in (3, 12, 30):
        assert suggested(job, tmp_path / "cut", after) == undisturbed[:after]
    RunFolder(tmp_path / "cut").optuna_journal.unlink()  # as in a sweep that began without one
    assert suggested(job, tmp_path / "cut", 30) == undisturbed
    suggested(job, tmp_path / "lost", 12)
    RunFolder(tmp_path / "lost").optuna_journal.unlink()
    assert suggested(job, tmp_path / "lost", 30) == undisturbed


def test_optuna_takes_no_result_of_a_trial_that_runs_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    job = sweep(LR, trials=4, searcher="optuna")
    journal = Journal(job, folder)
    for name in "abcd":
        journal.suggest(name)
    folder.stop_flag.touch()
    journal.on_trial_complete("a", {METRIC: 9.0, "tokens": 1e5})  # ended since the sweep was stopped
    folder.stop_flag.unlink()
    journal.on_trial_complete("b", {METRIC: 9.0, "tokens": 1e5, "state": "failed"})
    journal.on_trial_complete("c", error=True)
    again = Journal(job, folder)
    for name, value in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True):
        again.suggest(name)
        again.on_trial_complete(name, {METRIC: value, "tokens": 1e6, "state": "finished"})
    told = re.findall(r'"values":\[([\d.]+)\]', folder.optuna_journal.read_text())
    assert told == ["1.0", "2.0", "3.0", "4.0"]


def test_a_line_that_a_killed_driver_left_is_cut_and_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    job, folder = sweep(LR, trials=4, searcher="optuna"), RunFolder(tmp_path)
    whole = suggested(job, tmp_path / "whole", 4)
    suggested(job, tmp_path, 2)
    for path in (folder.trials_file, folder.optuna_journal):
        path.write_bytes(path.read_bytes() + b'{"number": 2, "par')
        assert cut_torn_line(path)
    assert suggested(job, tmp_path, 4) == whole
    folder.optuna_journal.write_text("\0\0\0\n\0\n")
    with pytest.raises(RunError, match=r"journal optuna\.jsonl cannot be read"):
        Journal(job, folder)


def test_no_trial_begins_that_would_pass_the_budget(tmp_path: Path) -> None:
    assert len(suggested(sweep(LR, trials=9, max_tokens=3.5e6), tmp_path / "a", 9)) == 3


def test_what_was_pruned_leaves_tokens_for_others(tmp_path: Path) -> None:
    journal = Journal(sweep(LR, trials=9, max_tokens=2e6), RunFolder(tmp_path))
    assert [journal.suggest(name) for name in "abc"] == [{"number": 0}, {"number": 1}, None]
    journal.on_trial_complete("a", {METRIC: 4.0, "tokens": 2e5})
    assert journal.suggest("d") is None  # 0.2 and 1 spent: no room for another whole one
    journal.on_trial_complete("b", {METRIC: 4.0, "tokens": 2e5})
    assert journal.suggest("e") == {"number": 2}
    journal.on_trial_complete("e", {METRIC: 4.0, "tokens": 9e5})
    assert journal.suggest("f") == journal.FINISHED


def test_trials_of_every_block_size_are_evaluated_at_one_context() -> None:
    job = sweep(GRID)
    contexts = {trial_job(job, n, {"packing.block_size": n}).eval.block_size for n in (64, 128, 256)}
    assert contexts == {64}
    asked = job.model_copy(update={"eval": job.eval.model_copy(update={"block_size": 32})})
    assert trial_job(asked, 0, {"packing.block_size": 128}).eval.block_size == 32


@pytest.mark.parametrize(
    ("search", "more", "told"),
    [
        ({"train.lr": {"loguniform": [1e-2, 1e-5]}}, {"trials": 2}, "inverted"),
        ({"train.lr": {"uniform": [1, 1]}}, {"trials": 2}, "inverted or empty"),
        ({"train.lr": {"loguniform": [0, 1]}}, {"trials": 2}, "above 0"),
        ({"train.lr": {"choice": [1], "grid": [1]}}, {"trials": 2}, "exactly one"),
        ({"train.lr": {"choice": []}}, {"trials": 2}, "at least 1 item"),
        ({"train.lrr": {"choice": [1e-3]}}, {"trials": 2}, "did you mean lr?"),
        ({"train.lr": {"choice": [1e-3, -1]}}, {"trials": 2}, "not -1 (searched: -1)"),
        ({"corpus.holdout": {"choice": [0.1]}}, {"trials": 2}, "same held-out text"),
        ({"name": {"choice": ["a"]}}, {"trials": 2}, "names its trials"),
        (LR, {}, "give the number of trials"),
        (GRID, {"trials": 7}, "the grid has 6 points"),
        (GRID, {"searcher": "optuna"}, "optuna has no grid"),
        (LR, {"trials": 2, "max_tokens": 1e5}, "is too small for one trial"),
        (LR, {"trials": 2, "sheduler": "asha"}, "did you mean scheduler?"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    search: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(JobError) as refused:
        sweep(search, **more)
    assert told in str(refused.value)


def test_equal_steps_of_unequal_batches_are_refused() -> None:
    job = sweep(LR, trials=2).model_dump(mode="json")
    job["train"] |= {"max_tokens": None, "max_steps": 10}
    job["tune"]["search"] = {"packing.block_size": {"choice": [64, 128]}}
    with pytest.raises(JobError, match=r"give train\.max_tokens instead"):
        build_job(job)
