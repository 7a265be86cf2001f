"""What counts as running out of memory, what the error advises, and when there is nothing smaller to try."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from raydist.errors import OutOfMemory
from raydist.folder import RunFolder
from raydist.job.plan import Plan
from raydist.job.schema import Job
from raydist.run.attempts import halved, plan_attempt
from raydist.sealed import append_sealed
from raydist.training.memory import memory_watched
from raydist.training.room import Room, changes
from tests.train_parts import LLAMA, VOCABULARY, make_job, make_spec, write_tokenizer


def test_a_failed_allocation_is_told_apart_from_other_errors(tmp_path: Path) -> None:
    room = Room(make_spec(tmp_path, train={"micro_batch_size": 4}), torch.device("cpu"))
    told = r"(?s)micro batches of 4 sequences.*can't allocate memory.*micro_batch_size: auto \("
    with pytest.raises(OutOfMemory, match=told), memory_watched(room):
        torch.empty(2**50)
    with pytest.raises(OutOfMemory), memory_watched(room):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), memory_watched(room):
        raise RuntimeError("shapes differ")


# --- what would fit


def room_of(spec: Any, memory: int | None) -> Room:
    """On a GPU with so many bytes, or of a worker elsewhere."""
    room = Room(spec, None if memory is None else torch.device("cuda"))
    room.memory = memory
    return room


def test_the_error_names_what_would_fit_with_the_numbers_of_the_estimate(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    error = room_of(spec, 400_000).out_of_memory(MemoryError("no more"))
    assert str(error) == (
        "out of memory with micro batches of 1 sequences\n"
        "  why: no more; by the estimate a worker needs 0.482 MB of 0.4 MB (weights 0.0785 MB, gradients"
        " 0.0785 MB, optimizer 0.157 MB, activations 0.151 MB, logits 0.0164 MB,"
        " checkpoint copy in host memory 0.235 MB)\n"
        "  do: any of these would fit: strategy: {name: fsdp}, scaling.num_workers: 2 (0.325 MB);"
        " not enough by itself: train.gradient_checkpointing: true (0.419 MB),"
        " or packing.block_size: 16 (0.396 MB)"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    known = room_of(spec, None).out_of_memory(MemoryError(), "there")
    assert known.what == "out of memory there" and known.fix.startswith("any of these needs less: train.grad")


def test_an_adapter_counts_with_its_own_size_and_what_a_rule_forbids_is_left_out(tmp_path: Path) -> None:
    wide = {**LLAMA, "hidden_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(0)
    options = {key: value for key, value in wide.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options, vocab_size=VOCABULARY)
    base = write_tokenizer(tmp_path / "base")
    config.save_pretrained(base)
    model = {"model": {"base": str(base), "config": None, "tokenizer": None}}
    spec = make_spec(tmp_path, **model)
    sizes = room_of(make_spec(tmp_path, **model, adapter={}), None).sizes
    held = sizes.weight_bytes + 3 * 4 * sizes.trainable  # its gradients and AdamW's two
    fixed = 4 * 4 * room_of(spec, None).sizes.total
    assert held < fixed / 2
    error = room_of(spec, 65 * fixed // 100).out_of_memory(MemoryError())
    assert error.fix.startswith("any of these would fit: adapter: {method: lora} (")
    assert "; not enough by itself: train.gradient_checkpointing: true (" in error.fix
    factored = room_of(make_spec(tmp_path, train={"optimizer": {"name": "adafactor"}}), None)
    fix = factored.out_of_memory(MemoryError()).fix
    assert "train.gradient_checkpointing: true" in fix and "fsdp" not in fix


def test_only_what_would_be_a_change_is_named(tmp_path: Path) -> None:
    def named(workers: int = 1, **sections: Any) -> list[Any]:
        return list(changes(make_job(tmp_path, **sections), workers))

    checkpointing, half = {"train.gradient_checkpointing": True}, {"packing.block_size": 16}
    sharded, two = {"strategy": {"name": "fsdp"}}, {"scaling.num_workers": 2}
    base = {"model": {"base": "some/model", "config": None}}
    assert named() == [checkpointing, half, {**sharded, **two}]  # an adapter needs a base
    assert named(**base) == [checkpointing, {"adapter": {"method": "lora"}}, half, {**sharded, **two}]
    assert {"quantization": "int4"} in named(**base, adapter={"r": 4})
    tuned = {"gradient_checkpointing": True, "micro_batch_size": 2}
    assert named(train=tuned) == [{"train.micro_batch_size": "auto"}, half, {**sharded, **two}]
    assert named(2) == [checkpointing, half, sharded, {**sharded, "scaling.num_workers": 4}]
    assert named(strategy={"name": "fsdp"}, packing={"block_size": 8}) == [checkpointing, two]
    stages = [{"block_size": 16, "max_tokens": 100.0}, {"block_size": 64, "max_tokens": 100.0}]
    shorter = [{"block_size": 16, "max_tokens": 100.0}, {"block_size": 32, "max_tokens": 100.0}]
    assert {"stages": shorter} in named(train={"max_steps": None}, stages=stages)


def test_a_gpu_too_small_for_the_weights_is_refused_before_they_are_loaded(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, scaling={"num_workers": 8}, world_size=8)
    with pytest.raises(
        OutOfMemory, match=r"needs 0.314 MB before its first token, and its GPU has 0.2 MB"
    ) as refused:
        room_of(spec, 200_000).require_fixed_parts()
    assert "strategy: {name: fsdp}" in refused.value.fix
    room_of(spec, 314_000).require_fixed_parts()
    room_of(make_spec(tmp_path, strategy={"name": "fsdp"}, world_size=8), 200_000).require_fixed_parts()
    room_of(spec, None).require_fixed_parts()
    on_cpu = Room(spec, torch.device("cpu"))
    on_cpu.memory = 1
    on_cpu.require_fixed_parts()  # its memory may be swapped, and is not its own


# --- halving


def test_it_is_halved_down_to_one_and_not_where_the_job_says_how_many(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    error = OutOfMemory("here")
    auto = {"micro_batch_size": "auto"}
    of_auto = make_job(tmp_path, train=auto)
    with pytest.raises(OutOfMemory, match="here"):  # the attempt did not begin: the model does not fit
        halved(of_auto, folder, plan_attempt(of_auto, None, [], None), 1, error)
    append_sealed(folder.metrics_file, {"kind": "start", "step": 0, "attempt": 1})

    def found(job: Job) -> list[str]:
        plans: list[Plan] = [plan_attempt(job, None, [], None)]
        with contextlib.suppress(OutOfMemory):
            for _ in range(9):
                tokens = halved(job, folder, plans[-1], 1, error)
                plans.append(plan_attempt(job, None, [], tokens))
        assert len(plans) < 9
        assert len({(plan.samples, plan.global_batch_size) for plan in plans}) == 1
        return [plan.micro_batches for plan in plans]

    assert found(make_job(tmp_path, train=auto)) == ["4", "2", "1"]
    assert folder.data()["micro_batch_halved"] == {"1": 32}
    assert found(make_job(tmp_path, train={"micro_batch_size": 4})) == ["4"]
    stages = [{"block_size": 16, "max_tokens": 100}, {"block_size": 64, "max_tokens": 100}]
    curriculum = make_job(tmp_path, train={**auto, "max_steps": None}, stages=stages)
    assert found(curriculum) == ["4, then 4", "4, then 2", "4, then 1", "2, then 1", "1, then 1"]
