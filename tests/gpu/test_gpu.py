"""On a GPU: the losses of a plain loop, resumed bit for bit, every attention, every optimizer, under Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import ModelError
from raydist.files import read_jsonl
from raydist.job.schema import Job
from raydist.model.attention.choose import NAMES, Chosen, set_attention, use_attention
from raydist.model.attention.per_document import PER_DOCUMENT
from raydist.model.build import Fitted, build_model, take_fitted
from raydist.model.loss import autocast, loss_of, to_device
from raydist.parallel.world import World
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    losses,
    make_spec,
    plain_losses,
    stopped_and_resumed,
    training_blocks,
    write_tokenizer,
)
from tests.unit.parallel import saves
from tests.unit.parallel.matrix import CASES, name_of, sections
from tests.weights import weight_hash

WIDE = {**LLAMA, "hidden_size": 128, "max_position_embeddings": 128}
"""Heads of 32 and blocks of 128, for kernels that take no less."""
OPTIMIZERS = Job.model_json_schema()["$defs"].get("Optimizer", {}).get("properties", {}).get("name", {})


def on(device: str, *values: Any, name: str = "") -> Any:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param(device, *values, marks=marks, id="-".join(filter(None, [device, name])))


def on_each(names: Any, *also_on_cpu: Any, name: Any = str) -> list[Any]:
    """A parameter of each on the GPU, and of some on the CPU too."""
    on_gpu = [on("cuda", each, name=name(each)) for each in names]
    return [*on_gpu, *(on("cpu", each, name=name(each)) for each in also_on_cpu)]


@pytest.mark.parametrize("world", [on("cuda")], indirect=True)
def test_loss_for_loss_it_is_a_plain_loop(tmp_path: Path, world: World) -> None:
    """On the CPU: tests/unit/training/test_loop.py."""
    spec = make_spec(tmp_path, train={"global_batch_size": 5, "micro_batch_size": 2})
    train(spec, world)
    assert [*losses(spec.run).values()] == pytest.approx(plain_losses(spec, world.device), rel=1e-4)


class Watched(Hook):
    """After the first steps, which compile and make optimizer state, a step that waits for the GPU raises."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        torch.cuda.set_sync_debug_mode("error" if 3 <= attempt.step < 9 else "default")

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("world", [on("cuda")], indirect=True)
@pytest.mark.parametrize("more", [{}, {"adapter": {"r": 4}}, {"strategy": {"name": "fsdp"}}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(
    tmp_path: Path, world: World, precision: str, more: dict[str, Any]
) -> None:
    """On the CPU: tests/unit/training/test_norms.py."""
    base = {"base": str(write_base(tmp_path / "base")), "config": None, "tokenizer": None}
    train_options = {"max_steps": 10, "mixed_precision": precision, "logging_steps": 100}
    rare = {"eval": {"eval_steps": 100}, "checkpoint": {"save_steps": 100}}
    spec = make_spec(tmp_path, model=base, train=train_options, **rare, **more)
    assert train(spec, world, hooks=[Watched()]).step == 10


@pytest.mark.parametrize(
    ("world", "case"), on_each(CASES, ("fsdp", "lora", "fp32"), name=name_of), indirect=["world"]
)
def test_stopped_and_resumed_it_ends_bit_identical(
    tmp_path: Path, world: World, case: tuple[str, str, str]
) -> None:
    base = write_base(tmp_path / "base")
    whole, cut = stopped_and_resumed(tmp_path, 2, world, **sections(case, base))
    assert losses(cut) == losses(whole)
    assert weight_hash(cut / "model") == weight_hash(whole / "model")


SAVES = {name: how for name, how in saves.CASES.items() if name != "replicated" and "lora" not in name}


@pytest.mark.parametrize(("world", "case"), on_each(SAVES, "ddp"), indirect=["world"])
def test_behind_training_the_same_is_saved_as_at_once(tmp_path: Path, world: World, case: str) -> None:
    """From pinned memory, though steps go on. On CPU with two ranks: tests/unit/parallel/test_saver.py."""
    more = SAVES[case]
    steps = {**more.get("train", {}), "max_steps": 3}
    spec = make_spec(tmp_path, **{**more, "model": {"config": saves.WIDE}, "train": steps})
    pinned: list[bool] = []

    class Pinned(Hook):
        def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
            pinned.append(attempt.strategy._saver._buffer.is_pinned())  # type: ignore[attr-defined]

    train(spec, world, hooks=[saves.Twice(tmp_path / "saved"), Pinned()])
    assert pinned == [world.device.type == "cuda"]


def write_base(folder: Path) -> Path:
    torch.manual_seed(1)
    options = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.mark.parametrize(
    ("world", "name"),
    on_each([name for name in NAMES if name != "eager"], PER_DOCUMENT, "sdpa"),
    indirect=["world"],
)
def test_attention_of_mixed_documents_is_eager_attention(tmp_path: Path, world: World, name: str) -> None:
    """Loss and gradients, of blocks of many documents each."""
    spec = make_spec(tmp_path, model={"config": WIDE}, packing={"block_size": 128})
    arrays = training_blocks(spec).batch([0, 1, 2, 3])
    batch = to_device({key: torch.from_numpy(array) for key, array in arrays.items()}, world.device)
    assert (batch["document_lengths"] > 0).sum(1).min() > 2
    precision = "bf16" if name.startswith("flash") else "fp32"

    def gradients(choose: Any) -> tuple[float, torch.Tensor]:
        def fit(model: torch.nn.Module) -> None:
            choose(model)
            take_fitted(model, Fitted(Chosen(name), head=None, uncompiled="attention alone is compared"))

        model = build_model(spec.job, spec.tokenizer, world.device, fit=fit)
        with torch.no_grad():  # as trained: at their initial scale attention hardly matters
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        with autocast(world.device, precision):
            loss = loss_of(model, batch)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, reference = gradients(lambda model: use_attention(model, "eager"))
    try:
        loss, found = gradients(
            lambda model: set_attention(model, world.device, document_mask=True, asked=name)
        )
    except ModelError as refused:
        if name in (PER_DOCUMENT, "sdpa"):
            raise
        pytest.skip(f"{refused.what}: {refused.why}")
    within = 1e-4 if precision == "fp32" else 5e-2
    assert loss == pytest.approx(expected, rel=within)
    assert (found - reference).norm() < within * reference.norm()


@pytest.mark.parametrize(
    ("world", "name"), on_each(OPTIMIZERS.get("enum", ["adamw"]), "adamw"), indirect=["world"]
)
def test_every_optimizer_learns_and_resumes_bit_identical(tmp_path: Path, world: World, name: str) -> None:
    """The last steps teach: the loss of the last is below that of the first."""
    named = {"optimizer": {"name": name}} if OPTIMIZERS else {}
    whole, cut = stopped_and_resumed(tmp_path, 7, world, train={**named, "micro_batch_size": 2})
    assert losses(whole)[20] < losses(whole)[1]
    assert losses(cut) == losses(whole)
    assert weight_hash(cut / "model") == weight_hash(whole / "model")


@pytest.mark.parametrize("world", [on("cuda")], indirect=True)
def test_the_largest_micro_batch_is_found_and_nothing_is_left_of_the_tries(
    tmp_path: Path, world: World
) -> None:
    """In 4 GiB, where a sequence takes about 20 MiB. On the CPU: tests/unit/training/test_micro_batch.py."""
    wide = {**LLAMA, "intermediate_size": 16_384, "num_hidden_layers": 1}
    sizes = {"global_batch_size": 512, "max_steps": 3, "micro_batch_size": "auto"}
    sections = {"model": {"config": wide}, "packing": {"block_size": 64}}
    found = make_spec(tmp_path, run="found", train=sizes, **sections)
    total = torch.cuda.get_device_properties(world.device).total_memory
    torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total, world.device)
    try:
        train(replace(found, find_micro_batch=True), world)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
    start = next(r for r in read_jsonl(found.run / "metrics.jsonl") if r["kind"] == "start")
    tried = {each["sequences"]: each["bytes"] for each in start["micro_batches_tried"]}
    assert tried[512] is None and 8 <= start["micro_batch_size"] < 512
    assert tried[start["micro_batch_size"]] < 4 * 2**30
    named = {**sizes, "micro_batch_size": start["micro_batch_size"]}
    alone = make_spec(tmp_path, run="named", train=named, **sections)
    train(alone, world)
    assert [*losses(found.run).values()] == pytest.approx([*losses(alone.run).values()], rel=1e-5)


@pytest.mark.parametrize("world", [on("cuda")], indirect=True)
def test_under_ray_it_is_the_loop_alone(tmp_path: Path, world: World, request: pytest.FixtureRequest) -> None:
    """On the CPU: tests/integration/test_train_ray.py."""
    request.getfixturevalue("ray_local")
    from raydist.cluster.trainer import run_attempt

    alone, under_ray = (
        make_spec(tmp_path, run=run, scaling={"use_gpu": True}) for run in ("alone", "under-ray")
    )
    train(alone, world)
    assert run_attempt(under_ray).step == 20
    assert losses(under_ray.run) == losses(alone.run)
    assert weight_hash(under_ray.run / "model") == weight_hash(alone.run / "model")
