"""QLoRA: an adapter on a base in 4 or 8 bits trains, resumes, loads and merges as what it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import JobError, ModelError
from raydist.folder import RunFolder
from raydist.job.identity import differences
from raydist.model import quantized as quantized_module
from raydist.model.build import build_model, check_fits, load_config, model_sizes, n_parameters
from raydist.model.export import load_trained, merge_adapter
from raydist.model.layers import layers_of
from raydist.model.loss import autocast, loss_of
from raydist.model.quantization import load_dequantized, quantization_config
from raydist.model.quantized import QuantizedLinear
from raydist.parallel import build
from raydist.run.preflight import check_job
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    losses,
    make_job,
    make_spec,
    run_ranks,
    stopped_and_resumed,
    write_tokenizer,
)
from tests.unit.model.test_attention import packed
from tests.weights import weight_hash

CPU = torch.device("cpu")

KINDS = ("int4", "int8")
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = torch.tensor([[5, 9, 23, 40, 17, 3]])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """A pretrained model in bf16, its weights large enough for an adapter to say something."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **options, vocab_size=VOCABULARY), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", LLAMA)


def qlora(base: Path, bits: str | None, **adapter: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(base), "config": None, "tokenizer": None},
        "adapter": {"r": 4, "dropout": 0.0, **adapter},
        "quantization": bits,
    }


def trained(tmp_path: Path, base: Path, bits: str | None, steps: int = 3) -> AttemptSpec:
    spec = make_spec(tmp_path, **qlora(base, bits), train={"max_steps": steps})
    train(spec)
    return spec


def quantized(model: nn.Module, bits: str) -> list[QuantizedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.bits == bits]


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


# --- training


@pytest.mark.parametrize("bits", KINDS)
def test_the_loss_falls_and_the_base_stays(
    tmp_path: Path, base: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def keep(*args: Any, **options: Any) -> nn.Module:
        model = build_model(*args, **options)
        kept.extend((p, p.detach().clone()) for p in model.parameters() if not p.requires_grad)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert len(quantized(model, bits)) == 14  # all but the head
        return model

    monkeypatch.setattr(build, "build_model", keep)
    found = losses(trained(tmp_path, base, bits, steps=20).run)
    assert found[20] < found[1] - 0.2
    assert kept and all(torch.equal(parameter, before) for parameter, before in kept)


@pytest.mark.parametrize("bits", KINDS)
def test_a_quantized_layer_is_a_linear_layer_of_its_dequantized_weight(
    tmp_path: Path, base: Path, bits: str
) -> None:
    model = build_model(make_job(tmp_path, **qlora(base, bits)), base, CPU)
    layer = quantized(model, bits)[0]
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight.data.copy_(layer.dequantized(torch.float32))
    for precision in ("fp32", "bf16"):
        results = []
        for one in (layer.eval(), dense):
            x = torch.linspace(-2, 2, 3 * layer.in_features).view(1, 3, -1).requires_grad_()
            with autocast(torch.device("cpu"), precision):
                out = one(x)
            out.float().square().sum().backward()
            results.append((out, x.grad))
        (out, gradient), (expected, expected_gradient) = results
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_two_ranks_train_as_one_does(tmp_path: Path, base: Path) -> None:
    one, two = (
        make_spec(tmp_path, world_size=n, run=f"run-{n}", **qlora(base, "int4"), train={"max_steps": 6})
        for n in (1, 2)
    )
    train(one)
    run_ranks(two)
    assert [*losses(two.run).values()] == pytest.approx([*losses(one.run).values()], rel=1e-5)


@pytest.mark.parametrize("bits", KINDS)
def test_resumed_it_ends_bit_identical(tmp_path: Path, base: Path, bits: str) -> None:
    """With all at once: dropout, gradient checkpointing and bf16."""
    options = {
        **qlora(base, bits, dropout=0.1),
        "train": {"max_steps": 8, "gradient_checkpointing": True, "mixed_precision": "bf16"},
    }
    whole, cut = stopped_and_resumed(tmp_path, after=5, **options)
    assert weight_hash(cut / "model") == weight_hash(whole / "model")


# --- the trained model


@pytest.mark.parametrize(("bits", "config"), [("int4", LLAMA), ("int8", LLAMA), ("int4", GPT2)])
def test_the_merged_model_is_the_trained_one(tmp_path: Path, bits: str, config: dict[str, Any]) -> None:
    spec = trained(tmp_path, write_base(tmp_path / "base", config), bits)
    model = load_trained(spec.run / "model")
    assert quantized(model, bits)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(RunFolder(spec.run))).eval()
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    logits = model(IDS).logits
    assert largest(merged(IDS).logits - logits) < 1e-4 * largest(logits)
    with model.disable_adapter():
        assert largest(model(IDS).logits - logits) > 1e-2 * largest(logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of transformers
def test_on_the_original_base_the_adapter_would_be_another_model(tmp_path: Path, base: Path) -> None:
    """So the folder says how the base was quantized, and its card how to load it."""
    folder = trained(tmp_path, base, "int4").run / "model"
    logits = load_trained(folder)(IDS).logits
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(folder)!r}")
    names: dict[str, Any] = {}
    exec(code, names)
    as_the_card_says = names["model"].train()(IDS).logits  # in evaluation, some CPUs compute in bf16
    assert largest(as_the_card_says - logits) < 2e-2 * largest(logits)
    (folder / "quantization_config.json").unlink()
    assert largest(load_trained(folder)(IDS).logits - logits) > 5e-2 * largest(logits)


def test_another_base_is_refused_for_a_quantized_run_and_taken_for_others(tmp_path: Path, base: Path) -> None:
    spec = trained(tmp_path / "quantized", base, "int8")
    with pytest.raises(ModelError, match=r"(?s)quantized run.*9%.*leave --base out"):
        merge_adapter(RunFolder(spec.run), base)
    plain = trained(tmp_path / "plain", base, None)
    expected = weight_hash(merge_adapter(RunFolder(plain.run)))
    copy = shutil.move(base, tmp_path / "moved")
    with pytest.raises(ModelError, match=r"(?s)cannot be merged into .*base.*--base FOLDER"):
        merge_adapter(RunFolder(plain.run))
    assert weight_hash(merge_adapter(RunFolder(plain.run), copy)) == expected


# --- what cannot be


def test_it_needs_an_adapter_and_is_part_of_a_runs_identity(tmp_path: Path, base: Path) -> None:
    with pytest.raises(JobError, match="int4 needs an adapter"):
        make_job(tmp_path, **{**qlora(base, "int4"), "adapter": None})
    one, other = (make_job(tmp_path, **qlora(base, bits)) for bits in ("int4", "int8"))
    assert differences(one, other) == ["quantization: 'int4' -> 'int8'"]


def test_a_base_that_is_quantized_already_is_refused(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    job = make_job(tmp_path, **qlora(base, "int4"))
    with pytest.raises(JobError, match=r"(?s)quantized already.*model\.base"):
        check_fits(load_config(job), job)


def test_unknown_target_modules_are_told_before_workers_start_and_by_them(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path, **qlora(base, "int4", target_modules=["query"]))
    for refused in (lambda: check_job(job), lambda: build_model(job, base, CPU)):
        with pytest.raises(ModelError, match=r"(?s)query.*choose from .*gate_proj.*q_proj"):
            refused()


def test_a_machine_where_bitsandbytes_does_not_work_is_told(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    job = make_job(tmp_path, **qlora(base, "int4"))
    for refused in (lambda: check_job(job), lambda: build_model(job, base, CPU)):
        with pytest.raises(ModelError, match=r"(?s)on cpu.*no kernel.*python -m bitsandbytes"):
            refused()


# --- what it costs


def test_the_memory_of_the_weights_is_foreseen(tmp_path: Path, base: Path) -> None:
    foreseen = {}
    for bits in KINDS:
        for precision in ("fp32", "bf16"):
            job = make_job(tmp_path, **qlora(base, bits), train={"mixed_precision": precision})
            built = build_model(job, base, CPU)
            held = sum(p.numel() * p.element_size() for p in built.parameters())
            foreseen[bits, precision] = model_sizes(load_config(job), job).weight_bytes
            assert foreseen[bits, precision] == held
            assert n_parameters(built) == model_sizes(load_config(job), job).total
    for bits in KINDS:
        assert foreseen[bits, "bf16"] < foreseen[bits, "fp32"]
    for precision in ("fp32", "bf16"):
        assert foreseen["int4", precision] < foreseen["int8", precision]


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_a_quantized_base_whose_weights_do_not_fit_is_refused(tmp_path: Path, base: Path, bits: str) -> None:
    """A layer of another width too: transformers does not compare the shapes of what it quantizes."""
    job = make_job(tmp_path, **qlora(base, bits))
    whole = (base / "config.json").read_text()
    for change, said in (
        ({"num_hidden_layers": 1}, "unexpected: "),
        ({"intermediate_size": 80}, "another shape: "),
    ):
        (base / "config.json").write_text(json.dumps({**json.loads(whole), **change}))
        for refused in (
            lambda: check_job(job),
            lambda: build_model(job, base, CPU),
            lambda: load_dequantized(str(base), quantization_config(job)),
        ):
            with pytest.raises(ModelError, match=rf"do not fit its config(?s:.*){said}"):
                refused()


# --- how often weights are dequantized, and what a compiler sees


WARNINGS_OF_THE_COMPILER = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


@pytest.mark.parametrize(
    ("bits", "checkpointing"),
    [("int4", False), ("int4", True), ("int8", "selective")],
)
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[*WARNINGS_OF_THE_COMPILER, pytest.mark.slow])]
)
def test_a_weight_is_dequantized_once_for_each_product_in_its_dtype_and_breaks_no_graph(
    tmp_path: Path,
    base: Path,
    bits: str,
    checkpointing: bool | str,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointing}
    model = build_model(make_job(tmp_path, **qlora(base, bits), train=options), base, CPU)
    batch = packed((13, 1, 18), VOCABULARY)
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    expected = gradients(model, batch)
    if compiled:
        torch._dynamo.reset()
        for layer in layers_of(model):
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True, dynamic=False)
        gradients(model, batch)
        assert not torch._dynamo.utils.counters["graph_break"]
    seen: list[torch.dtype] = []

    def count(*args: Any) -> torch.Tensor:
        seen.append(args[-1])
        return dequantize(*args)

    dequantize = quantized_module._dequantized
    monkeypatch.setattr(quantized_module, "_dequantized", count)
    found = gradients(model, batch)
    forward, backward = 14, 14 - 3  # what enters the first layer needs no gradient
    # the compiler finds that a layer's last product is not needed again
    recomputed = 0 if checkpointing is not True else forward - 2 if compiled else forward
    assert seen == [torch.bfloat16] * (forward + recomputed + backward)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-2, atol=2e-2 * largest(expected[name]))


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_product_with_its_adapter_is_one_graph_that_keeps_no_weight(
    tmp_path: Path, base: Path, bits: str
) -> None:
    model = build_model(make_job(tmp_path, **qlora(base, bits)), base, CPU)
    layer = next(m for m in model.modules() if isinstance(getattr(m, "base_layer", None), QuantizedLinear))
    x = torch.linspace(-2, 2, 3 * layer.in_features).view(1, 3, -1)
    found, kept = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for forward in (layer.forward, torch.compile(layer.forward, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward(given)
        out.square().sum().backward()
        found.append((out, given.grad))
    torch.testing.assert_close(found[1], found[0])
    dense = (layer.out_features, layer.in_features)
    assert kept and not [tensor for tensor in kept if tensor.shape == dense]


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with autocast(CPU, "bf16"):
        loss = loss_of(model, batch)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
