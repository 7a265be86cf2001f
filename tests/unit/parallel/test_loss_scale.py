"""fp16: the scale of the loss as torch sets it, steps that are skipped, and the state that survives."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.errors import JobError, TrainingError
from raydist.files import read_json, read_jsonl
from raydist.folder import RunFolder
from raydist.model.build import build_model
from raydist.model.precision import check_precision, exact_fp32, uses_tf32
from raydist.parallel import loss_scale
from raydist.parallel.ddp import Ddp, DdpOnCpu, DdpOnGpu
from raydist.parallel.loss_scale import LossScale
from raydist.parallel.world import World
from tests.train_parts import losses, make_job, make_spec
from tests.unit.parallel.half import CASES, FITS, QUICK, SKIPPED, run_half
from tests.unit.parallel.matrix import STEPS, name_of
from tests.unit.parallel.test_strategies import on_ranks


def test_it_decides_as_torchs_scaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    ours, torchs = LossScale(), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    taken = 0
    for norm in [math.inf, 1, 2, math.nan, 1, 1, 1, 1, 1, 1, math.inf, math.inf, 1]:
        torchs.scale(weight.sum())
        weight.grad = torch.tensor([float(norm)])
        before = weight.item()
        torchs.step(optimizer)
        torchs.update()
        accepted = ours.accepts(float(norm))
        assert accepted == (weight.item() != before)
        assert ours.scale == torchs.get_scale()
        taken += accepted
    assert (taken, ours.skipped, ours.bad) == (9, 4, 0)


def test_twenty_steps_in_a_row_end_the_run() -> None:
    scale = LossScale()
    for _ in range(19):
        assert not scale.accepts(math.inf)
    with pytest.raises(TrainingError, match="the gradient norm is inf") as told:
        scale.accepts(math.inf)
    assert "20 steps in a row" in str(told.value)


@pytest.mark.parametrize("kind", [DdpOnCpu, DdpOnGpu])
def test_a_step_in_fp16_is_that_of_fp32_to_rounding_and_is_skipped_when_it_overflows(
    kind: type[Ddp], tmp_path: Path
) -> None:
    """The strategy itself, past the refusal; that of GPUs needs none for this."""
    spec = make_spec(tmp_path)
    half = make_job(tmp_path, train={"mixed_precision": "fp16"})
    batch = next(iter(spec_batches(spec)))
    found: dict[str, Any] = {}
    for name, job in (("fp32", spec.job), ("fp16", half)):
        strategy = kind(build_model(spec.job, spec.tokenizer, torch.device("cpu")), job, World())
        loss = strategy.forward_backward(batch, 100, last=True)
        found[name] = loss.item(), strategy.update(1e-3, 1.0).item(), strategy
    assert found["fp16"][0] == pytest.approx(found["fp32"][0], rel=2e-3)
    assert found["fp16"][0] != found["fp32"][0]
    assert found["fp16"][1] == pytest.approx(found["fp32"][1], rel=2e-2)  # unscaled
    strategy = found["fp16"][2]
    before = [weight.clone() for weight in strategy.module.parameters()]
    strategy.loss_scale.scale = 2.0**40
    strategy.forward_backward(batch, 100, last=True)
    assert not math.isfinite(strategy.update(1e-3, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, strategy.module.parameters(), strict=True))
    assert strategy.loss_scale == LossScale(2.0**39, skipped=1, bad=1)
    strategy.loss_scale.scale = 2.0**16
    strategy.forward_backward(batch, 100, last=True)
    assert math.isfinite(strategy.update(1e-3, 1.0))  # nothing is left of the infinite gradients


def spec_batches(spec: Any) -> Any:
    from raydist.training.data import open_data

    steps = open_data(spec).feed.loader(0, 1, 0, 8, global_batch_size=[4], micro_batch_size=[4])
    return (micro for step in steps for micro in step.micro_batches)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_ranks(tmp_path_factory.mktemp("half"), functools.partial(run_half, cases=QUICK))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rest = [case for case in CASES if case not in QUICK]
    return on_ranks(tmp_path_factory.mktemp("half"), functools.partial(run_half, cases=rest))


@pytest.mark.timeout(900)  # the first of them runs all
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=map(name_of, CASES),
)
def test_every_strategy_skips_trains_and_resumes(
    request: pytest.FixtureRequest, quick: Path, case: tuple[str, str, str]
) -> None:
    half = quick if case in QUICK else request.getfixturevalue("rest")
    folder = half / name_of(case)
    failed = folder / "error.txt"
    assert not failed.exists(), failed.read_text()
    found = read_json(folder / "found.json")
    records = read_jsonl(folder / "whole" / "metrics.jsonl")
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["grad_norm"] is None for r in trained] == [True, True, False, False]
    assert [r["loss_scale"] for r in trained] == [2.0**39, FITS, FITS, FITS]
    assert [r["skipped_steps"] for r in trained] == [1, 2, 2, 2]
    told = [r["what"] for r in records if r["kind"] == "incident"]
    assert [what.partition(":")[0] for what in told] == ["step 1 was skipped", "step 2 was skipped"]
    with_ddp = (quick if case[1] == "full" else half) / name_of(("ddp", *case[1:]))
    of_ddp = read_json(with_ddp / "found.json")["losses"]
    assert found["losses"] == pytest.approx(of_ddp, rel=5e-3)
    exact = not case[0].startswith("zero-3")
    assert found["losses_of_cut"] == pytest.approx(found["losses"], rel=0 if exact else 2e-4, abs=0)
    assert not exact or len(set(found["hashes"])) == 1
    alone = read_json(folder / "alone.json")["losses"]
    assert alone == pytest.approx(found["losses"], rel=5e-3)
    state = read_json(RunFolder(folder / "cut").checkpoint(STEPS) / "loss_scale.json")
    assert state == {"scale": FITS, "skipped": SKIPPED, "good": STEPS - SKIPPED, "bad": 0}


def test_a_run_says_what_it_computes_in(tmp_path: Path) -> None:
    from raydist.training.loop import train

    spec = make_spec(tmp_path, train={"max_steps": 1, "mixed_precision": "no"})
    torch.backends.cuda.matmul.allow_tf32 = True
    assert uses_tf32()
    train(spec)
    (start,) = [r for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "start"]
    assert (start["mixed_precision"], start["tf32"]) == ("fp32", False)
    assert len(losses(spec.run)) == 1


def test_fp32_is_never_tf32() -> None:
    for allow in (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: torch.set_float32_matmul_precision("high"),
    ):
        allow()
        assert uses_tf32()
        exact_fp32()
        assert not uses_tf32()
        assert not torch.backends.cuda.matmul.allow_tf32  # and the older name can be read
        assert not torch.backends.cudnn.allow_tf32


# --- bad input


def test_fp16_on_cpu_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    job = make_job(tmp_path, train={"mixed_precision": "fp16"})
    with pytest.raises(JobError, match="fp16 needs GPUs"):
        build_model(job, tmp_path / "there is no tokenizer", torch.device("cpu"))


def test_bf16_on_a_card_that_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such card is here: torch's answer for one."""
    answers = {"is_bf16_supported": lambda including_emulation: including_emulation}
    answers["get_device_name"] = lambda: "Tesla T4"
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    with pytest.raises(JobError, match="Tesla T4, has no bf16") as told:
        check_precision("bf16", "cuda", on_worker=True)
    assert "take fp16" in str(told.value)
    check_precision("fp16", "cuda", on_worker=True)
    check_precision("bf16", "cuda")  # the driver's own card says nothing of the workers'
