"""The optimizers of a job: each learns, resumes bit-identically, and takes the memory that was foreseen."""

from __future__ import annotations

import functools
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydist.errors import CheckpointError, ModelError
from raydist.files import read_json
from raydist.folder import RunFolder
from raydist.job.identity import differences
from raydist.job.schema import Train
from raydist.model.build import build_model, load_config, model_sizes
from raydist.parallel.footprint import worker_memory
from raydist.parallel.optimizer import make_optimizer, state_bytes
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    finish,
    fork_ranks,
    losses,
    make_job,
    make_spec,
    run_ranks,
    stopped_and_resumed,
    write_tokenizer,
)
from tests.unit.parallel.sharded_steps import SHAPES, compare
from tests.weights import weight_hash

MODEL = {
    "config": {**LLAMA, "hidden_size": 64, "intermediate_size": 96}
}  # matrices that bitsandbytes quantizes
STEPS = 12
TRAIN: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"betas": [0.8, 0.95], "eps": 1e-6}},
    "adamw_8bit": {"optimizer": {"name": "adamw_8bit", "betas": [0.8, 0.95]}},
    "adafactor": {"optimizer": "adafactor", "lr": 0.1},  # of the weights' own size
    "muon": {"optimizer": "muon"},
}
TRAIN = {name: {"max_steps": STEPS, **values} for name, values in TRAIN.items()}
ROUNDED = 3e-3
"""By how much losses may differ, relatively, where state is rounded to 8 bits or a step is made in 16."""
SLOTS = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "adamw_8bit": {
        *("exp_avg", "exp_avg_sq"),  # of the embeddings
        *("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"),
    },
    "adafactor": {"row_var", "col_var", "variance"},
    "muon": {"exp_avg", "exp_avg_sq", "momentum_buffer"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in RunFolder(run).checkpoint(step).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> its folder with two runs on one rank: `whole`, and `cut`, which was stopped and resumed."""

    @functools.cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        stopped_and_resumed(folder, 7, model=MODEL, train=TRAIN[name])
        return folder

    return of


def spec_of(folder: Path, name: str, run: str, **more: Any) -> AttemptSpec:
    return make_spec(folder, run=run, model=MODEL, train=TRAIN[name], **more)


def copy_until(step: int, run: Path, to: Path) -> None:
    """The run as it was after the checkpoint of that step."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(RunFolder(to).checkpoint(later), ignore_errors=True)


@pytest.mark.parametrize("name", TRAIN)
def test_the_loss_falls_and_a_resumed_run_is_bit_identical(alone: Callable[[str], Path], name: str) -> None:
    whole, cut = alone(name) / "whole", alone(name) / "cut"
    found = losses(whole)
    assert found[STEPS] < 0.95 * found[1]
    assert losses(cut) == found
    assert weight_hash(cut / "model") == weight_hash(whole / "model")
    prefixes = {key.partition(".")[0] for key in stored(whole, STEPS)}
    assert prefixes - {"model", "lm_head"} == SLOTS[name]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("adamw_8bit", "ddp"),
        pytest.param("adafactor", "ddp", marks=pytest.mark.slow),
        pytest.param("muon", "ddp", marks=pytest.mark.slow),
        pytest.param("muon", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_go_as_one_and_resume_bit_identical(
    alone: Callable[[str], Path], name: str, strategy: str
) -> None:
    two = spec_of(alone(name), name, strategy, world_size=2, strategy={"name": strategy})
    run_ranks(two)
    assert losses(two.run) == pytest.approx(losses(alone(name) / "whole"), rel=ROUNDED)
    cut = replace(two, run=two.run.with_name(f"{strategy}-cut"), attempt=2)
    copy_until(5, two.run, cut.run)
    run_ranks(cut)
    assert losses(cut.run) == losses(two.run)
    assert weight_hash(cut.run / "model") == weight_hash(two.run / "model")


def test_muon_goes_on_under_fsdp_from_what_ddp_saved(alone: Callable[[str], Path]) -> None:
    ddp = alone("muon") / "whole"
    on = spec_of(alone("muon"), "muon", "on", world_size=2, strategy={"name": "fsdp"}, attempt=2)
    copy_until(5, ddp, on.run)
    run_ranks(on)
    assert losses(on.run) == pytest.approx(losses(ddp), rel=ROUNDED)


def test_sharded_matrices_are_stepped_as_whole_ones(tmp_path: Path) -> None:
    work = tmp_path / "work.pickle"
    work.write_bytes(pickle.dumps(functools.partial(compare, tmp_path / "found.json")))
    finish(fork_ranks(work, 2))
    found = read_json(tmp_path / "found.json")
    assert found.keys() == {str(shape) for shape in SHAPES}
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize("name", [name for name in TRAIN if name != "adamw"])
def test_what_adamw_saved_is_refused_for_another_optimizer(alone: Callable[[str], Path], name: str) -> None:
    adamw = spec_of(alone("adamw"), "adamw", "whole")
    spec = spec_of(alone("adamw"), name, f"{name}-from-adamw", attempt=2)
    copy_until(5, adamw.run, spec.run)
    with pytest.raises(
        CheckpointError, match="tensors of the checkpoint do not fit the optimizer"
    ) as refused:
        train(spec)
    assert "the checkpoint has exp_avg, exp_avg_sq" in str(refused.value)
    assert "another optimizer wrote it; go on with that one" in str(refused.value)
    assert f"train.optimizer.name: 'adamw' -> '{name}'" in differences(adamw.job, spec.job)


@pytest.mark.parametrize("name", TRAIN)
def test_the_bytes_that_are_foreseen_are_those_that_are_kept(alone: Callable[[str], Path], name: str) -> None:
    spec = spec_of(alone(name), name, "whole")
    sizes = model_sizes(load_config(spec.job, VOCABULARY), spec.job)
    state = stored(spec.run, STEPS)
    kept = sum(tensor.nbytes for key, tensor in state.items() if key.partition(".")[0] in SLOTS[name])
    assert state_bytes(sizes.model, spec.job.train) == kept
    memory = worker_memory(spec.job, spec.plan, sizes)
    assert memory["optimizer"] == kept
    assert kept <= 8 * sizes.trainable
    if name == "adafactor":
        assert kept < 0.3 * sizes.trainable


def test_muon_steps_the_matrices_of_the_layers_and_adamw_the_rest(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "words")
    job = make_job(tmp_path, train={"optimizer": {"name": "muon", "betas": [0.9, 0.95]}})
    model = build_model(job, tokenizer, torch.device("cpu"))
    groups = make_optimizer(model, job.train).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    stepped = {
        (group["kind"], group["weight_decay"]): {names[p].rpartition(".layers.")[2] for p in group["params"]}
        for group in groups
    }
    matrices = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert len(matrices) == 14
    assert stepped[("muon", 0.1)] == {name.rpartition(".layers.")[2] for name in matrices}
    assert stepped[("adamw", 0.1)] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "model.norm.weight" in stepped[("adamw", 0.0)] and len(groups) == 3
    assert all(group["betas"] == (0.9, 0.95) for group in groups if group["kind"] == "adamw")


def test_muon_needs_layers_with_matrices() -> None:
    with pytest.raises(ModelError, match="muon finds no matrix to step"):
        make_optimizer(nn.Sequential(nn.Linear(3, 2)), Train(max_steps=1, optimizer="muon"))  # type: ignore[arg-type]
