"""Compiled layers: the same losses, one compilation for all layers, and what is done without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.errors import ModelError
from raydist.files import read_jsonl
from raydist.model import compiled
from raydist.model.build import build_model
from raydist.model.compiled import why_not_compiled
from raydist.model.loss import loss_of
from raydist.track.records import phase_seconds
from raydist.training.loop import train
from tests.train_parts import LLAMA, losses, make_spec, run_ranks, stopped_and_resumed
from tests.unit.model.test_attention import CPU, packed
from tests.unit.model.test_quantization import qlora, write_base
from tests.weights import weight_hash

pytestmark = [  # of torch's compiler itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]
LORA = {"adapter": {"r": 4, "dropout": 0.0}}


def options(**more: Any) -> dict[str, Any]:
    return {"train": {"max_steps": 6, "compile": True, **more}, "checkpoint": {"save_steps": 3}}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True},
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "checkpointing", "bf16"],
)
def test_it_trains_as_without_a_compiler_and_resumes_bit_identical(
    more: dict[str, Any], tmp_path: Path
) -> None:
    plain = make_spec(tmp_path, run="plain", train={"max_steps": 6, **more})
    train(plain)
    whole, cut = stopped_and_resumed(tmp_path, 3, **options(**more))
    assert losses(whole) == losses(cut) and weight_hash(whole / "model") == weight_hash(cut / "model")
    within = 1e-5 if more.get("mixed_precision") != "bf16" else 2e-2
    assert losses(whole) == pytest.approx(losses(plain.run), rel=within)
    start = read_jsonl(whole / "metrics.jsonl")[0]
    assert start["compiled"] and start["attention"] == "sdpa"
    seconds = phase_seconds(read_jsonl(whole / "metrics.jsonl"))
    assert seconds["compile"] > 5 * seconds["first_step"]
    assert "compile" not in phase_seconds(read_jsonl(plain.run / "metrics.jsonl"))
    assert "compiled again for each batch" in start["attention_passed_over"]["raydist_per_document"]
    assert "auto compiles on GPUs" in read_jsonl(plain.run / "metrics.jsonl")[0]["uncompiled"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_on_a_quantized_base_too(bits: str, tmp_path: Path) -> None:
    base = qlora(write_base(tmp_path / "base", LLAMA), bits)
    plain = make_spec(tmp_path, run="plain", train={"max_steps": 6}, **base)
    train(plain)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    whole, cut = stopped_and_resumed(tmp_path, 3, **options(), **base)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert losses(whole) == losses(cut) and weight_hash(whole / "model") == weight_hash(cut / "model")
    assert losses(whole) == pytest.approx(losses(plain.run), rel=1e-5)
    assert read_jsonl(whole / "metrics.jsonl")[0]["compiled"]


@pytest.mark.parametrize(
    ("strategy", "bits"),
    [
        pytest.param("ddp", None, marks=pytest.mark.slow),
        pytest.param("fsdp", None, marks=pytest.mark.slow),
        pytest.param("fsdp", "int4", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_without_a_compiler(strategy: str, bits: str | None, tmp_path: Path) -> None:
    base = qlora(write_base(tmp_path / "base", LLAMA), bits) if bits else {}
    plain = make_spec(tmp_path, run="plain", train={"max_steps": 6}, **base)
    train(plain)
    spec = make_spec(tmp_path, run="two", world_size=2, strategy={"name": strategy}, **options(), **base)
    run_ranks(spec)
    assert losses(spec.run) == pytest.approx(losses(plain.run), rel=1e-5)
    assert read_jsonl(spec.run / "metrics.jsonl")[0]["compiled"]


def test_layers_that_are_alike_are_compiled_once(tmp_path: Path) -> None:
    torch._dynamo.reset()
    deep = {"config": {**LLAMA, "num_hidden_layers": 6}}
    spec = make_spec(tmp_path, model=deep, train={"max_steps": 6, "compile": True})
    model = build_model(spec.job, spec.tokenizer, CPU)
    counters = torch._dynamo.utils.counters
    counters.clear()
    batch = packed((13, 1, 18), 64)
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    for _ in range(2):
        loss_of(model, batch).backward()
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        loss_of(model.eval(), batch)
        loss_of(model.train(), batch)
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_without_a_compiler_auto_goes_on_and_true_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiler_problem", lambda device: "InvalidCxxCompiler: no c++ here")
    with pytest.raises(ModelError, match=r"no c\+\+ here") as refused:
        why_not_compiled(True, CPU, "ddp")
    assert "install a C++ compiler" in refused.value.fix
    assert why_not_compiled("auto", torch.device("cuda"), "ddp") == "InvalidCxxCompiler: no c++ here"
    assert why_not_compiled("auto", CPU, "ddp") == "auto compiles on GPUs, not on CPU"
    assert why_not_compiled(False, torch.device("cuda"), "ddp") == "train.compile is false"
    assert "DeepSpeed" in why_not_compiled("auto", torch.device("cuda"), "zero")
