"""The figures of a run: tokens and operations per second, the share of a device's peak, seconds by phase."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.model.work import Work
from raydist.training import records
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from raydist.training.peak import peak_by_name
from raydist.training.phases import PHASES, Phases
from tests.train_parts import make_spec, run_ranks, training_blocks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == kind]


class KeepWork(Hook):
    work: Work

    def on_start(self, attempt: Attempt) -> None:
        self.work = attempt.work


@pytest.mark.parametrize("document_mask", [True, False])
def test_tokens_and_operations_are_those_of_the_steps_without_padding(
    tmp_path: Path, document_mask: bool
) -> None:
    sections = {"train": {"max_steps": 6, "logging_steps": 2}, "packing": {"document_mask": document_mask}}
    spec, kept = make_spec(tmp_path, **sections), KeepWork()
    train(spec, hooks=[kept])
    expected, feed = {}, training_blocks(spec)
    for step in range(1, 7):
        rows, samples = list[int](), range(4 * (step - 1), 4 * step)
        counts = feed.counts(samples.start, samples.stop)
        for g in samples:
            lengths = [n for n in feed.block(g)["document_lengths"].tolist() if n]
            rows += rows_of(lengths, feed.counts(g, g + 1).n_padding, document_mask)
        pairs = sum(n * (n + 1) // 2 for n in rows)
        flops = kept.work.per_input * sum(rows) + kept.work.per_pair[None] * pairs
        assert sum(rows) == counts.n_tokens + counts.n_eos
        expected[step] = counts.n_tokens, flops
    since = 0
    for record in of_kind(spec.run, "train"):
        steps = range(since + 1, record["step"] + 1)
        seconds, since = record["step_seconds"] * len(steps), record["step"]
        assert record["tokens_per_second"] * seconds == pytest.approx(sum(expected[n][0] for n in steps))
        assert record["flops_per_second"] * seconds == pytest.approx(sum(expected[n][1] for n in steps))
        assert record["mfu"] is None  # a CPU's peak is not known
    assert since == 6


def rows_of(lengths: list[int], padding: int, document_mask: bool) -> list[int]:
    """What attention keeps apart in a block, without its padding, which comes last."""
    if not document_mask:
        return [sum(lengths) - padding]
    assert not padding or lengths[-1] == padding
    return lengths[:-1] if padding else lengths


def test_ranks_report_what_they_do_together(tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 3, "global_batch_size": 5}}
    alone, both = (make_spec(tmp_path, run=f"{n}", world_size=n, **sections) for n in (1, 2))
    train(alone)
    run_ranks(both)
    work = [
        [r["flops_per_second"] * r["step_seconds"] for r in of_kind(spec.run, "train")]
        for spec in (alone, both)
    ]
    assert work[0] == pytest.approx(work[1])


def test_mfu_is_the_share_of_all_devices_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "peak_flops", lambda device: 1e12)
    spec = make_spec(tmp_path, world_size=1, train={"max_steps": 2})
    train(spec)
    for record in of_kind(spec.run, "train"):
        assert 0 < record["mfu"] == pytest.approx(record["flops_per_second"] / 1e12)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 2060", None),
    ],
)
def test_a_peak_is_found_by_the_whole_name_of_a_card(name: str, teraflops: float | None) -> None:
    assert peak_by_name(name) == (None if teraflops is None else teraflops * 1e12)


# --- phases


def test_each_second_counts_for_one_phase() -> None:
    now = 100.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    phases = Phases("load", {"plan": 2.0}, clock=lambda: now)
    wait(1)
    phases.begin("steps")
    wait(10)
    with phases.during("evaluation"):
        wait(3)
        with phases.during("compile"):
            wait(5)
        wait(0.5)
    wait(20)
    assert phases.of("steps") == 30 and phases.of("load", "compile", "none") == 6
    with contextlib.suppress(KeyError), phases.during("evaluation"):
        wait(4)
        raise KeyError
    wait(1)
    assert phases.take() == {"plan": 2.0, "load": 1, "steps": 31, "evaluation": 7.5, "compile": 5}
    wait(50)
    phases.begin("steps")
    wait(2)
    assert phases.take() == {"steps": 2}


def test_a_phase_says_how_far_it_is_and_the_outer_one_goes_on_where_it_was() -> None:
    phases = Phases("load")
    assert phases.now == ("load", 0, 0)
    phases.begin("steps", 3, 30)
    with phases.during("evaluation"):
        assert phases.now == ("evaluation", 0, 0)
        phases.at(100, 4000)
        assert phases.now == ("evaluation", 100, 4000)
    assert phases.now == ("steps", 3, 30)


class Look(Hook):
    """Waits until the run's folder says what is going on."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int] | None] = []

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == 3:
            self._wait(attempt)
            with attempt.phases.during("evaluation"):
                attempt.phases.at(5, 10)
                self._wait(attempt)

    def _wait(self, attempt: Attempt) -> None:
        while attempt.folder.progress(attempt.spec.attempt) != attempt.phases.now:
            time.sleep(0.01)
        self.seen.append(attempt.folder.progress(attempt.spec.attempt))


def test_what_rank_0_is_doing_stands_in_the_folder(tmp_path: Path) -> None:
    spec, look = make_spec(tmp_path), Look()
    train(spec, hooks=[look])
    assert look.seen == [("steps", 2, 20), ("evaluation", 5, 10)]
    folder = RunFolder(spec.run)
    assert folder.progress(spec.attempt + 1) is None  # it begins to write once it runs
    for damaged in (b"", b"[]", b"\0\0", b'{"attempt": 1, "phase": "steps"}'):
        folder.progress_file.write_bytes(damaged)
        assert folder.progress(1) is None


def test_compiling_counts_for_itself_whatever_runs() -> None:
    now = compiled = 100.0
    phases = Phases("load", clock=lambda: now, compiling=lambda: compiled)
    now, compiled = 105.0, 103.0
    phases.begin("first_step")
    now, compiled = 108.0, 110.0  # two threads compiled
    phases.begin("steps")
    now, compiled = 110.0, 0.0  # the compiler was reset
    assert phases.take() == {"load": 2, "compile": 6, "first_step": 0, "steps": 2}


class AddPhase(Hook):
    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        with attempt.phases.during("thinking"):
            pass


def test_an_attempt_records_where_its_time_went(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, run="whole")
    began = time.time()
    train(replace(spec, driver_seconds={"prepare": 5.0, "start": 1.0}, sent=began - 3), hooks=[AddPhase()])
    (record,) = of_kind(spec.run, "phases")
    seconds, took = record["seconds"], time.time() - began
    assert set(seconds) == {*PHASES, "thinking"} - {"plan", "imports", "compile", "probe", "skipping"}
    assert seconds["prepare"] == 5.0 and 4.0 <= seconds["start"] <= 4.0 + took
    own = sum(spent for name, spent in seconds.items() if name not in ("prepare", "start"))
    assert 0.5 * took < own <= took + 0.01
    assert all(
        seconds[name] > 0 for name in ("load", "first_step", "steps", "evaluation", "checkpoint", "export")
    )
    assert record["step"] == 20 and read_jsonl(spec.run / "metrics.jsonl")[-1] == record


class Failing(Hook):
    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == 2:
            raise RuntimeError("no more")


def test_an_attempt_that_fails_or_stops_records_it_too(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(RuntimeError, match="no more"):
        train(spec, hooks=[Failing()])
    spec.run.joinpath("stop").touch()
    train(replace(spec, attempt=2))
    failed, stopped = of_kind(spec.run, "phases")
    assert (failed["attempt"], failed["step"], stopped["attempt"]) == (1, 2, 2)
    assert "export" not in failed["seconds"] and "export" not in stopped["seconds"]
