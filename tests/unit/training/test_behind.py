"""Checkpoints that are written while training goes on: what they hold, and what becomes of failures."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raydist.background import in_background
from raydist.errors import JobError, StorageError
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.parallel import saver
from raydist.parallel.share import share_of
from raydist.parallel.world import World
from raydist.training import behind, checkpoint
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from tests.train_parts import losses, make_spec
from tests.weights import weight_hash

PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Gate:
    """A disk whose files are written only while it is open, or until it refuses."""

    def __init__(self) -> None:
        self.open, self.refuses, self.written = threading.Event(), False, threading.Event()
        self.open.set()

    def create(self, path: Path) -> FileIO:
        gate = self

        class Stream(FileIO):
            def write(self, content: Any) -> int:
                assert gate.open.wait(PATIENCE_SECONDS), "training waited for the disk"
                if gate.refuses:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(content)

        return Stream(path, "xb")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(saver, "_create", made.create)
    yield made
    made.open.set()


class At(Hook):
    """Calls something after given steps."""

    def __init__(self, **then: Callable[[], object]) -> None:
        self._then = {int(step.removeprefix("step_")): call for step, call in then.items()}

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self._then.get(attempt.step, lambda: None)()


def incidents(spec: AttemptSpec) -> list[str]:
    return [r["what"] for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "incident"]


def test_training_goes_on_while_a_slow_disk_writes(tmp_path: Path, gate: Gate) -> None:
    """The disk takes nothing between the steps 5 and 9; what it holds then is the state of step 5."""
    keep = {"save_total_limit": 9}
    aside = make_spec(tmp_path, run="aside", checkpoint={"asynchronous": False, **keep})
    train(aside)
    spec = make_spec(tmp_path, run="behind", checkpoint=keep)
    committed: list[tuple[int, int]] = []

    class Commits(Hook):
        def on_commit(self, attempt: Attempt, commit: checkpoint.Commit) -> None:
            committed.append((commit.step, attempt.step))

    train(spec, hooks=[At(step_5=gate.open.clear, step_9=gate.open.set), Commits()])
    assert committed[0][0] == 5 and committed[0][1] >= 9
    assert [step for step, _ in committed] == [5, 10, 15, 20]
    for step in (5, 10, 15, 20):
        one, other = (checkpoint.read_commit(RunFolder(each.run).checkpoint(step)) for each in (spec, aside))
        assert one.files == other.files and one.seen == other.seen
    assert losses(spec.run) == losses(aside.run)
    assert weight_hash(spec.run / "model") == weight_hash(aside.run / "model")
    assert not incidents(spec)


def test_a_save_that_comes_due_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 12})
    let = threading.Thread(target=lambda: (began.wait(PATIENCE_SECONDS), gate.open.set()))
    began = threading.Event()
    let.start()
    seconds: list[float] = []

    class Clock(Hook):
        def on_step(self, attempt: Attempt, result: StepResult) -> None:
            seconds.append(attempt.phases.of("checkpoint"))

    train(spec, hooks=[At(step_5=gate.open.clear, step_10=began.set), Clock()])
    let.join()
    assert RunFolder(spec.run).committed_steps() == [5, 10, 12]
    assert seconds[10] > seconds[9]  # the wait counts as the checkpoint's


def test_a_disk_that_is_full_ends_the_attempt_and_the_checkpoint_before_stays(
    tmp_path: Path, gate: Gate
) -> None:
    spec = make_spec(tmp_path)

    def fill() -> None:
        gate.refuses = True

    with pytest.raises(StorageError) as refused:
        train(spec, hooks=[At(step_7=fill)])
    half = RunFolder(spec.run).checkpoint(10)
    assert refused.value.what.startswith(f"no space is left on the disk: {half}/shard-00001")
    left = checkpoint.newest_valid(RunFolder(spec.run))
    assert left is not None and left.step == 5
    gate.refuses = False
    result = train(replace(spec, attempt=2))
    assert result.step == 20 and len(losses(spec.run)) == 20


def test_what_an_ended_attempt_still_writes_stays_out_of_the_next_ones_folder(
    tmp_path: Path, gate: Gate
) -> None:
    folder = RunFolder(tmp_path / "run").checkpoint(5)
    state = {"w": torch.ones(1000)}
    share = share_of(state, 0, 1)
    gate.open.clear()
    handles = []
    for content in (b"old", b"new"):
        checkpoint.begin(folder)
        own, more = saver.Saver(World()), {"more": content}
        handles.append(own.save(folder, [*share], share.values(), more, behind=True, lasting=True))
    gate.open.set()
    assert all(handle.done(PATIENCE_SECONDS) for handle in handles)
    assert (folder / "more").read_bytes() == b"new"


def test_weights_change_only_once_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, copy = threading.Event(), saver.np.copyto
    weight = torch.arange(5.0)
    share = share_of({"w": weight}, 0, 1)

    def late(*given: Any) -> None:
        assert copying.wait(PATIENCE_SECONDS)
        copy(*given)

    monkeypatch.setattr(saver.np, "copyto", late)
    own = saver.Saver(World())
    handle = own.save(tmp_path, [*share], share.values(), {}, behind=True, lasting=True)
    settled = in_background(own.settle, "settle")
    assert not handle.done() and not settled.done()
    copying.set()
    settled.result(PATIENCE_SECONDS)
    weight.zero_()
    assert handle.done(PATIENCE_SECONDS)
    assert torch.equal(load_file(tmp_path / saver.file_name(0))["w"], torch.arange(5.0))


def test_the_copys_memory_is_used_again(tmp_path: Path) -> None:
    spec, places = make_spec(tmp_path), set()

    class Places(Hook):
        def on_commit(self, attempt: Attempt, commit: checkpoint.Commit) -> None:
            places.add(attempt.strategy._saver._buffer.data_ptr())  # type: ignore[attr-defined]

    train(spec, hooks=[Places()])
    assert len(places) == 1


# --- where there is no memory for a copy


def test_without_memory_for_a_copy_training_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "available_memory", lambda: 100_000)
    spec = make_spec(tmp_path)
    train(spec)
    (said,) = incidents(spec)
    assert said.startswith("training waits while a checkpoint is written: ")
    assert "0.0001 GB of memory free, and copies of the state of its 1 workers take 0.000235 GB" in said
    insisting = make_spec(tmp_path, run="insisting", checkpoint={"asynchronous": True})
    with pytest.raises(JobError, match=r"checkpoint\.asynchronous is true") as refused:
        train(insisting)
    assert "0.000235 GB" in refused.value.why and "auto or false" in refused.value.fix
    assert not losses(insisting.run)


class Ranks(World):
    """Rank 0 of some, whose facts are given."""

    def gather(self, value: Any) -> list[Any]:
        return [*facts]


facts: Sequence[tuple[str, int, int, int]] = ()


@pytest.mark.parametrize(
    ("ranks", "short"),
    [
        ([("a", 10**9, 0, 3 * 10**9)] * 2 + [("b", 10**9, 0, 11 * 10**8)], ""),
        ([("a", 10**9, 0, 2 * 10**9)] * 2, "a has 2 GB of memory free, .* of its 2 workers take 2 GB$"),
        ([("a", 10**9, 5 * 10**8, 15 * 10**8)], "take 1 GB, besides 0.5 GB for steps and model/"),
    ],
)  # fmt: skip
def test_the_workers_of_a_host_share_its_memory(
    ranks: list[tuple[str, int, int, int]], short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "facts", ranks)
    found = behind.short_of_memory(Ranks(), *ranks[0][1:])
    assert bool(found) == bool(short) and re.search(short, found)


# --- the end


def test_the_model_is_there_once_the_last_checkpoint_counts(tmp_path: Path, gate: Gate) -> None:
    """It is written meanwhile: nobody waits for the checkpoint first."""
    spec = make_spec(tmp_path)
    folder = RunFolder(spec.run)
    seen: list[tuple[bool, bool]] = []

    def watch() -> None:
        card = folder.path / ".model.tmp" / "README.md"
        while not card.exists():
            assert not stop.wait(0.002), "model/ was not written meanwhile"
        seen.append((folder.model.exists(), 20 in folder.committed_steps()))
        gate.open.set()

    stop = threading.Event()
    watcher = in_background(watch, "watch")
    train(spec, hooks=[At(step_20=gate.open.clear)])
    watcher.result(PATIENCE_SECONDS)
    assert seen == [(False, False)]
    assert folder.model.exists() and 20 in folder.committed_steps()


def test_the_best_may_be_the_one_that_is_being_written(tmp_path: Path, gate: Gate) -> None:
    """Its loss is compared, and model/ is of the last step without its files being read."""
    best = {"load_best_model_at_end": True}
    spec = make_spec(tmp_path, checkpoint=best, train={"lr": 1e-3})
    opener = in_background(lambda: opened(spec, gate), "open")
    train(spec, hooks=[At(step_20=gate.open.clear)])
    opener.result(PATIENCE_SECONDS)
    evaluated = {
        r["step"]: r["eval_loss"] for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "eval"
    }
    assert min(evaluated, key=evaluated.__getitem__) == 20
    assert not incidents(spec)
    aside = make_spec(tmp_path, run="aside", train={"lr": 1e-3}, checkpoint={"asynchronous": False})
    train(aside)
    assert weight_hash(spec.run / "model") == weight_hash(aside.run / "model")


def opened(spec: AttemptSpec, gate: Gate) -> None:
    while not (spec.run / ".model.tmp" / "README.md").exists():
        assert not threading.Event().wait(0.002)
    gate.open.set()
