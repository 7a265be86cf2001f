"""Planted noise is skipped, named and accounted for; runs that skip resume, go back and end as they ought to.

The same under every strategy is in tests/unit/parallel/test_skips_of_strategies.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raydist.errors import CheckpointError, TrainingError
from raydist.feed import audit
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.training import checkpoint
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit, Skipped
from raydist.training.data import open_data
from raydist.training.hooks import Hook, StepResult, StopOnRequest
from raydist.training.loop import Attempt, train
from tests.poison import Part, write_poisoned
from tests.train_parts import losses, make_spec, write_log, write_tokenizer
from tests.unit.training.test_loop import Cut
from tests.weights import weight_hash

PARTS = [Part(260), Part(24, noise=1.0), Part(120), Part(60, noise=0.12), Part(60)]
WHOLE = range(31, 34)
"""Steps whose batches are noise as a whole."""
MIXED = range(47, 56)
"""Steps some of whose samples are noise."""
TRAIN = {"max_steps": 56, "global_batch_size": 8, "micro_batch_size": 8, "lr": 3e-2}
BEGUN = 30


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Poisoned:
    """A run that was stopped just before the noise; its newest checkpoints are of steps 25 and 30."""

    spec: AttemptSpec
    planted: set[tuple[str, int]]

    def going_on(self, run: str, mode: str = "on", **guards: Any) -> AttemptSpec:
        """A copy of the run, to go on with."""
        path = self.spec.run.with_name(run)
        shutil.copytree(self.spec.run, path)
        changed = self.spec.job.guards.model_copy(update={"mode": mode, **guards})
        job = self.spec.job.model_copy(update={"guards": changed})
        return replace(self.spec, run=path, job=job, attempt=2)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    torch.set_num_threads(1)
    storage = tmp_path_factory.mktemp("poisoned")
    write_tokenizer(storage / "words")
    planted = write_poisoned(storage / "tokens" / "log", PARTS)
    spec = make_spec(
        storage,
        train=TRAIN,
        packing={"block_size": 32, "window_shards": 1},
        eval={"eval_steps": 1000},
        checkpoint={"save_steps": 25},
        guards={"mode": "on", "window": 20},
    )
    assert train(spec, hooks=[stop_at(BEGUN)]).stopped
    return Poisoned(spec, planted)


def stop_at(step: int, begun: int = 0) -> StopOnRequest:
    """begun: the step that the attempt begins at."""
    asked = iter([False] * (step - begun - 1) + [True])
    return StopOnRequest(lambda: next(asked))


@pytest.fixture(scope="module")
def guarded(poisoned: Poisoned) -> AttemptSpec:
    """The run, gone on with past the noise."""
    spec = poisoned.going_on("guarded")
    train(spec)
    return spec


def skips(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "skip"]


def newest(run: Path) -> Commit:
    found = checkpoint.newest_valid(RunFolder(run))
    assert found is not None
    return found


def test_the_planted_documents_are_the_ones_named(guarded: AttemptSpec, poisoned: Poisoned) -> None:
    found = skips(guarded.run)
    assert {r["step"] for r in found} >= {*WHOLE} and {r["step"] for r in found} <= {*WHOLE, *MIXED}
    assert all(r["action"] == "skipped" and r["stand_out"] and r["loss_score"] > 6 for r in found)
    named = {(d["file"], d["row"]) for r in found for d in r["documents"]}
    trained_on = planted_in(guarded, poisoned)
    assert named <= poisoned.planted and len(named) >= 0.9 * len(trained_on)
    assert {file for file, _ in named} == {"part-1.txt", "part-3.txt"}
    assert {d["source"] for r in found for d in r["documents"]} == {"random"}


def planted_in(spec: AttemptSpec, poisoned: Poisoned) -> set[tuple[str, int]]:
    """Planted documents that are not held out."""
    from raydist.feed.trace import pieces

    feed = open_data(spec).feed
    read = {(p.file, p.row) for g in range(spec.plan.samples) for p in pieces(feed, g)}
    return read & poisoned.planted


def test_what_is_skipped_is_part_of_the_position(guarded: AttemptSpec) -> None:
    last, found = newest(guarded.run), skips(guarded.run)
    assert (last.step, last.samples) == (56, 448)
    assert last.skipped.steps == len(found) and last.skipped.samples == 8 * len(found)
    assert last.skipped.ranges[0] == (240, 264)  # three batches in a row are one range
    assert all(last.skipped.holds(r["first_sample"], r["end_sample"]) for r in found)
    lines = read_jsonl(guarded.run / "ledger.jsonl")
    assert sum(line.get("skipped", {}).get("tokens", 0) for line in lines) == last.skipped.tokens > 0
    assert "skipped" not in lines[0]
    counts = open_data(guarded).feed.counts(0, 448)
    assert last.seen.tokens + last.skipped.tokens == counts.n_tokens
    trained = [r for r in read_jsonl(guarded.run / "metrics.jsonl") if r["kind"] == "train"]
    assert (trained[-1]["skipped_steps"], trained[-1]["skipped_samples"]) == (len(found), 8 * len(found))


def test_the_ledger_does_not_lead_to_a_commit_that_skipped_something_else(
    guarded: AttemptSpec, tmp_path: Path
) -> None:
    copy = RunFolder(shutil.copytree(guarded.run, tmp_path / "run"))
    last = newest(copy.path)
    assert checkpoint.disagreement(copy, last) is None
    less = replace(last, skipped=replace(last.skipped, ranges=last.skipped.ranges[1:]))
    assert isinstance(checkpoint.disagreement(copy, less), CheckpointError)


def test_the_audit_adds_up(guarded: AttemptSpec) -> None:
    last, feed = newest(guarded.run), open_data(guarded).feed
    counted = audit(feed, last.samples, last.skipped.ranges)
    assert counted.n_skipped == last.skipped.tokens
    assert counted.n_trained == last.seen.tokens
    assert (counted.n_eos, counted.n_padding) == (last.seen.eos, last.seen.padding)
    parts = counted.n_trained, counted.n_held_out, counted.n_duplicate, counted.n_skipped, counted.n_left
    assert counted.n_in == sum(parts) and counted.n_left > 0


def test_recording_changes_no_bit_of_training(poisoned: Poisoned) -> None:
    plain, recorded = poisoned.going_on("plain", "off"), poisoned.going_on("recorded", "record")
    for spec in (plain, recorded):
        train(spec, hooks=[stop_at(36, BEGUN)])
    assert losses(plain.run) == losses(recorded.run)
    ends = [newest(spec.run) for spec in (plain, recorded)]
    assert ends[0].step == 36 and bits_of(ends[0].path) == bits_of(ends[1].path)
    assert ends[0].skipped == ends[1].skipped == Skipped() and ends[0].seen == ends[1].seen
    assert (ends[0].guards is None, ends[1].guards is None) == (True, False)
    assert not skips(plain.run)
    found = skips(recorded.run)
    assert {*WHOLE} <= {r["step"] for r in found} and {r["action"] for r in found} == {"recorded"}
    assert {(d["file"], d["row"]) for r in found[:3] for d in r["documents"]} <= poisoned.planted


def bits_of(folder: Path) -> dict[str, bytes]:
    """Weights and optimizer state by name. The order of names in a file is not always the same."""
    (file,) = folder.glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


# --- resumed


class Die(Hook):
    def __init__(self, after: int) -> None:
        self._after = after

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == self._after:
            raise Cut


def test_stopped_and_killed_between_skips_it_ends_bit_identical(
    guarded: AttemptSpec, poisoned: Poisoned
) -> None:
    cut = poisoned.going_on("cut")
    assert train(cut, hooks=[stop_at(32, BEGUN)]).step == 32  # two of three were skipped
    assert (newest(cut.run).guards or {})["in_a_row"] == 2
    with pytest.raises(Cut):
        train(replace(cut, attempt=3), hooks=[Die(48)])
    train(replace(cut, attempt=4))
    assert_equal_ends(cut, guarded)


def assert_equal_ends(one: AttemptSpec, other: AttemptSpec) -> None:
    assert weight_hash(one.run / "model") == weight_hash(other.run / "model")
    ends = [newest(spec.run) for spec in (one, other)]
    assert ends[0].guards == ends[1].guards and ends[0].guards is not None
    assert (ends[0].skipped, ends[0].seen) == (ends[1].skipped, ends[1].seen)
    assert checkpoint.disagreement(RunFolder(one.run), ends[0]) is None


# --- back to a checkpoint


class Look(Hook):
    """What the strategy would save after a step, and where the run is then."""

    def __init__(self, at: int, folder: Path) -> None:
        self._at, self.folder = at, folder

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == self._at:
            self.folder.mkdir()
            attempt.strategy.save(self.folder, behind=False)
            self.position = attempt.position


def test_too_many_in_a_row_lead_back_to_the_last_good_checkpoint(poisoned: Poisoned, tmp_path: Path) -> None:
    """To that of step 25, which was due, whatever checkpoints of stops there are."""
    spec, look = poisoned.going_on("back", max_skipped=3), Look(33, tmp_path / "state")
    before = checkpoint.read_commit(RunFolder(poisoned.spec.run).checkpoint(25))
    train(spec, hooks=[look])
    back = next(r for r in skips(spec.run) if r["action"] == "rolled back")
    assert (back["step"], back["back_to"], back["skipped_from"], back["end_sample"]) == (33, 25, 200, 264)
    assert bits_of(look.folder) == bits_of(before.path)
    assert (look.position.samples, look.position.seen) == (264, before.seen)
    assert (look.position.skipped.steps, look.position.skipped.ranges) == (8, ((200, 264),))
    last = newest(spec.run)
    assert (last.step, last.samples) == (56, 448)
    counts = audit(open_data(spec).feed, last.samples, last.skipped.ranges)
    assert (counts.n_trained, counts.n_skipped) == (last.seen.tokens, last.skipped.tokens)
    cut = poisoned.going_on("back-cut", max_skipped=3)
    assert train(cut, hooks=[stop_at(32, BEGUN)]).step == 32
    train(replace(cut, attempt=3))
    assert_equal_ends(cut, spec)


class Spoil(Hook):
    """A weight is no number after a step, as a fault of the machine leaves it."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == 13 and not attempt.position.skipped.steps:
            with torch.no_grad():
                next(iter(attempt.strategy.module.parameters())).fill_(math.nan)


def test_spoiled_weights_are_healed_by_the_checkpoint(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        train={"max_steps": 25, "micro_batch_size": 4},
        guards={"mode": "on", "window": 20, "max_skipped": 2},
    )
    train(spec, hooks=[Spoil()])
    first, back = skips(spec.run)
    assert (first["step"], first["action"], first["loss"]) == (14, "skipped", None)
    assert first["reason"] == "the loss is nan; the gradient norm is nan"
    assert (back["step"], back["action"]) == (15, "rolled back")
    assert (back["back_to"], back["skipped_from"]) == (10, 40)
    assert newest(spec.run).skipped.ranges == ((40, 60),)
    assert newest(spec.run).updates == 20
    assert all(math.isfinite(losses(spec.run)[step]) for step in range(16, 26))


def test_before_the_first_checkpoint_the_weights_stay_as_they_were(tmp_path: Path) -> None:
    """Batches without a number, whatever the weights: there is nothing to go back to."""
    guards = {"mode": "on", "window": 20, "max_skipped": 2, "max_rollbacks": 1}
    spec = make_spec(tmp_path, train={"max_steps": 25, "micro_batch_size": 4}, guards=guards)

    class Spoiled(Spoil):
        def on_start(self, attempt: Attempt) -> None:
            with torch.no_grad():
                next(iter(attempt.strategy.module.parameters())).fill_(math.nan)

    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        train(spec, hooks=[Spoiled()])
    assert [(r["action"], r.get("back_to")) for r in skips(spec.run)] == [
        ("skipped", None),
        ("rolled back", None),
        ("skipped", None),
        ("skipped", None),
    ]


def test_at_the_limit_the_run_ends_at_its_last_checkpoint_and_can_go_on(poisoned: Poisoned) -> None:
    spec = poisoned.going_on("limit", max_skipped=2, max_rollbacks=0)
    with pytest.raises(TrainingError, match=r"step 32: the loss \S+ is \S+ deviations above") as ended:
        train(spec)
    assert "samples 248 to 255, such as random: part-1.txt, row " in ended.value.where
    assert "guards.max_skipped is 2, guards.max_rollbacks 0" in ended.value.why
    assert "raydist show RUN --step 32" in ended.value.fix
    assert newest(spec.run).step == BEGUN
    larger = spec.job.model_copy(update={"guards": poisoned.spec.job.guards})
    assert train(replace(spec, job=larger, attempt=3), hooks=[stop_at(34, BEGUN)]).step == 34


class Behind(Hook):
    """Reads norms and losses a step later, as on a GPU."""

    def on_start(self, attempt: Attempt) -> None:
        attempt.norms.behind = 1


def test_a_spike_that_is_read_a_step_later_is_recorded_at_its_own_step(poisoned: Poisoned) -> None:
    spec = poisoned.going_on("behind", "record")
    train(spec, hooks=[stop_at(33, BEGUN), Behind()])
    found = skips(spec.run)
    assert [(r["step"], r["first_sample"]) for r in found] == [(31, 240), (32, 248), (33, 256)]
    assert {(d["file"], d["row"]) for r in found for d in r["documents"]} <= poisoned.planted
    assert len((newest(spec.run).guards or {})["losses"]) == 20


class Short(Hook):
    """What a guard thinks of the run's last step, which has fewer samples than the others."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self.size, self.windows = result.counts, attempt.skips.guard.to_json()
        assert (
            attempt.step > 1
            or attempt.skips.guard.load_windows(
                {"losses": [1e-3] * 20, "norms": [1e-3] * 20, "block_size": 32}
            )
            is None
        )


def test_a_short_last_batch_is_no_spike(tmp_path: Path) -> None:
    """Its mean over few labels varies more. Any other step would be one here."""
    spec = make_spec(tmp_path, guards={"mode": "record", "window": 20})
    (stage,) = spec.plan.stages
    short = replace(spec.plan, stages=(replace(stage, samples=2 * stage.global_batch_size + 1),))
    train(replace(spec, plan=short), hooks=[hook := Short()])
    assert [r["step"] for r in skips(spec.run)] == [2]
    assert len(hook.windows["losses"]) == 20 and hook.windows["losses"][-2:] != [1e-3] * 2


def test_guards_can_be_turned_on_for_a_run_that_began_without(poisoned: Poisoned) -> None:
    spec = poisoned.going_on("turned-on", "off")
    assert train(spec, hooks=[stop_at(31, BEGUN)]).step == 31
    assert newest(spec.run).guards is None
    job = spec.job.model_copy(update={"guards": poisoned.spec.job.guards})
    assert train(replace(spec, job=job, attempt=3), hooks=[stop_at(32, 31)]).step == 32
    known = newest(spec.run).guards
    assert known is not None and (known["back_to"], len(known["losses"])) == (31, 1)


@pytest.mark.slow
def test_with_the_defaults_noise_costs_less_than_one_percent(tmp_path: Path) -> None:
    """Held-out loss after 300 steps, by that of a run whose corpus has no noise."""
    parts = [Part(900), Part(60, noise=1.0), Part(500), Part(120, noise=0.1), Part(700)]
    tokens = tmp_path / "tokens"
    planted = write_poisoned(tokens / "poisoned", parts)
    write_poisoned(tokens / "clean", [Part(1 if part.noise else part.n_documents) for part in parts])
    write_poisoned(tokens / "log", [Part(300)], seed=9)
    write_tokenizer(tmp_path / "words")
    ends = {}
    for name in ("clean", "poisoned"):
        spec = make_spec(
            tmp_path,
            run=f"run-{name}",
            corpus={"holdout": 0.0},
            train={"max_steps": 300, "global_batch_size": 8, "micro_batch_size": 8},
            packing={"block_size": 32, "window_shards": 1},
            eval={"eval_steps": 1000, "max_tokens": 10_000},
            guards={"mode": "on"},
        )
        logs = {"random": tokens / name}
        result = train(replace(spec, logs=logs, eval_logs={"held out": tokens / "log"}))
        ends[name] = result.evals["held out"]["eval_loss"]
    assert not skips(tmp_path / "run-clean")
    found = skips(tmp_path / "run-poisoned")
    assert {*range(113, 121)} <= {r["step"] for r in found}
    named = {(d["file"], d["row"]) for r in found for d in r["documents"]}
    assert named <= planted and {("part-1.txt", row) for row in range(60)} <= named
    assert ends["poisoned"] == pytest.approx(ends["clean"], rel=0.01)


# --- two epochs


def test_what_another_epoch_trained_is_trained(tmp_path: Path) -> None:
    """By hand: how often each token was an input of a trained and of a skipped sample."""
    write_log(tmp_path / "tokens" / "log")
    feed = open_data(make_spec(tmp_path)).feed
    once = feed.samples_per_epoch
    assert once is not None
    from raydist.feed.trace import pieces

    skipped = ((3, 9), (once - 2, once + 4), (2 * once - 5, 2 * once - 1))
    times: dict[tuple[str, int, int], list[int]] = {}
    for g in range(2 * once):
        for piece in pieces(feed, g):
            n = piece.length - (piece.rest == 0)
            for token in range(piece.skipped, piece.skipped + n):
                of = times.setdefault((piece.file, piece.row, token), [0, 0])
                of[any(lo <= g < hi for lo, hi in skipped)] += 1
    counted = audit(feed, 2 * once, skipped)
    assert counted.n_trained == sum(trained > 0 for trained, _ in times.values())
    assert counted.n_repeated == sum(max(trained - 1, 0) for trained, _ in times.values())
    assert counted.n_skipped == sum(not trained for trained, _ in times.values())
    assert counted.n_left == 0 and counted.n_samples == 2 * once - 16
    alone = audit(feed, once, ((3, 9),))
    assert alone.n_skipped > 0 and audit(feed, 2 * once, ((3, 9),)).n_skipped == 0
    assert alone.n_in == alone.n_trained + alone.n_held_out + alone.n_skipped


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
