"""Every combination of strategy, adapter, quantization and precision, in one pair of processes.

`run_matrix` is called on two ranks, and afterwards by one process, which resumes what the two saved.
For each case: a run, the same resumed from its middle, and its results loaded and, for an adapter,
merged. What was found goes to FOLDER/<case>/found.json and alone.json, to be judged by the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raydist.errors import RaydistError
from raydist.files import write_json
from raydist.folder import RunFolder
from raydist.model.export import load_trained, merge_adapter
from raydist.parallel.world import World
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import newest_valid
from raydist.training.data import open_data
from raydist.training.evaluate import evaluate
from raydist.training.loop import train
from tests.families import MIXTURES, NO_INT4
from tests.train_parts import losses, make_spec
from tests.weights import weight_hash

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    **{f"zero-{stage}": {"name": "zero", "stage": stage} for stage in (1, 2, 3)},
    **{f"zero-{stage}-offload": {"name": "zero", "stage": stage, "offload": "cpu"} for stage in (1, 2, 3)},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 4, "dropout": 0.0}},
    "int4": {"adapter": {"r": 4, "dropout": 0.0}, "quantization": "int4"},
    "int8": {"adapter": {"r": 4, "dropout": 0.0}, "quantization": "int8"},
    "grown": {"adapter": {"r": 4, "dropout": 0.0, "modules_to_save": ["embed_tokens"]}},
}
PRECISIONS = ("fp32", "bf16")

CASES = list(itertools.product(STRATEGIES, METHODS, PRECISIONS))
QUICK = [
    case
    for case in CASES
    if case[0] == "ddp"
    or (case[2] == "fp32" and case[:2] in {("fsdp", "int4"), ("zero-1", "int8"), ("zero-2", "int4")})
    or case in {("fsdp", "full", "bf16"), ("zero-3", "full", "fp32"), ("zero-3", "lora", "bf16")}
    or case in {("zero-3-offload", "lora", "fp32"), ("fsdp", "grown", "fp32"), ("zero-3", "grown", "fp32")}
]
"""With every strategy but two, every method and both precisions; the others take two minutes more."""

Case = tuple[str, str, str]


def families_of(family: str) -> list[Case]:
    """Cases for each family: full, LoRA and int4 where they are offered."""
    methods = [("ddp", "full"), ("fsdp", "full"), ("zero-3", "full"), ("ddp", "lora"), ("fsdp", "lora")]
    methods += [] if family in NO_INT4 else [("ddp", "int4"), ("fsdp", "int4")]
    if family in MIXTURES:  # whose experts are quantized here, not by bitsandbytes
        methods += [("zero-3", "int4"), ("ddp", "int8")]
    return [(*method, "fp32") for method in methods]


STEPS = 4
WITHIN = {
    "losses as DDP's": {"fp32": 1e-6, "bf16": 5e-3},
    "resumed with as many workers": {"fp32": 0.0, "bf16": 2e-4},
    "resumed with one worker of two": {"fp32": 1e-6, "bf16": 2e-4},
    "model/ loaded by transformers or peft": {"fp32": 1e-6, "bf16": 1e-3},
    "the adapter merged": {"fp32": 1e-6, "bf16": 1e-3},
}
"""By which losses may differ, relatively; 0 is bit for bit, weights too."""


def name_of(case: tuple[str, str, str]) -> str:
    return "_".join(case)


def recomputed(strategy: str, method: str) -> bool | int | str:
    """Each way of gradient checkpointing with every strategy that has it."""
    selective = 2 if strategy.startswith("zero-3") else "selective"
    return {"full": False, "lora": selective, "int4": True, "int8": 2, "grown": False}[method]


def sections(case: tuple[str, str, str], base: Path) -> dict[str, Any]:
    """grown: two new tokens, and an embedding that is tied to the head and trained whole, at its own rate."""
    strategy, method, precision = case
    grown = method == "grown"
    base, more = (base.with_name("tied"), str(base.with_name("more"))) if grown else (base, None)
    return {
        "model": {"base": str(base), "config": None, "tokenizer": None, "add_tokens": more},
        "strategy": STRATEGIES[strategy],
        "train": {
            "max_steps": STEPS,
            "global_batch_size": 5,
            "mixed_precision": precision,
            "gradient_checkpointing": recomputed(strategy, method),
            "embedding_learning_rate": 3e-2 if grown else None,
        },
        "checkpoint": {"save_steps": STEPS // 2},
        "eval": {"eval_steps": 100, "max_tokens": 400},
        **METHODS[method],
    }


def spec_of(case: tuple[str, str, str], folder: Path, world_size: int) -> AttemptSpec:
    run = f"{name_of(case)}/whole"
    spec = make_spec(folder, world_size=world_size, run=run, **sections(case, folder / "base"))
    return replace(spec, tokenizer=folder / "more") if case[1] == "grown" else spec


def with_two(case: tuple[str, str, str], folder: Path, rank: int) -> None:
    whole = spec_of(case, folder, 2)
    cut = replace(whole, run=whole.run.with_name("cut"))
    train(whole, World(rank, 2))
    if rank == 0:
        shutil.copytree(whole.run, cut.run)
        shutil.rmtree(cut.run / "model")
        shutil.rmtree(RunFolder(cut.run).checkpoint(STEPS))
        shutil.copytree(cut.run, cut.run.with_name("alone"))
    dist.barrier()
    train(replace(cut, attempt=2), World(rank, 2))
    if rank == 0:
        write_json(whole.run.with_name("found.json"), judge(whole, cut))


def judge(whole: AttemptSpec, cut: AttemptSpec) -> dict[str, Any]:
    commit = newest_valid(RunFolder(whole.run))
    assert commit is not None
    found = {
        "losses": [*losses(whole.run).values()],
        "losses_of_cut": [*losses(cut.run).values()],
        "hashes": [weight_hash(spec.run / "model") for spec in (whole, cut)],
        "trained": commit.eval_loss,
        "loaded": eval_loss(whole, load_trained(whole.run / "model")),
    }
    if whole.job.adapter is not None:
        found["merged"] = eval_loss(whole, load_trained(merge_adapter(RunFolder(whole.run))))
    return found


def eval_loss(spec: AttemptSpec, model: Any) -> float:
    """Of plain transformers or peft, in the precision of the run, by the run's own evaluation."""
    from raydist.model.attention.choose import set_attention

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    set_attention(bare, torch.device("cpu"), document_mask=True)
    precision = spec.job.train.mixed_precision
    return evaluate(model.float(), open_data(spec).eval_sets, World(), 4, precision)[0].eval_loss


def alone(case: tuple[str, str, str], folder: Path) -> None:
    """One rank goes on from what two saved."""
    spec = replace(spec_of(case, folder, 1), run=folder / name_of(case) / "alone", attempt=2)
    train(spec)
    write_json(spec.run.with_name("alone.json"), {"losses": [*losses(spec.run).values()]})


def run_matrix(folder: Path, part: str) -> None:
    """One rank of part "quick" or "rest"."""
    run_cases(folder, QUICK if part == "quick" else [case for case in CASES if case not in QUICK])


def run_families(folder: Path, family: str) -> None:
    run_cases(folder, families_of(family))


def run_cases(folder: Path, cases: list[tuple[str, str, str]]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    for case in cases:
        with told(folder / name_of(case)):
            with_two(case, folder, rank) if world_size > 1 else alone(case, folder)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def told(folder: Path) -> Any:
    """A case that fails on all ranks alike must not hide the others."""
    try:
        yield
    except (
        RaydistError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        KeyError,
        OSError,
    ):
        folder.mkdir(exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
