"""An optimizer's state by name and shape, whatever the optimizer keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer

from raydist.errors import CheckpointError, JobError, TrainingError
from raydist.job.schema import Train
from raydist.parallel.optimizer import make_optimizer
from raydist.parallel.saver import Saver
from raydist.parallel.share import share_of
from raydist.parallel.state import load_state, state_by_name
from raydist.parallel.world import World
from raydist.parallel.zero import flat_slots

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, set[str]]]] = {
    "adamw with amsgrad": (
        lambda groups: AdamW(groups, lr=0.0, amsgrad=True, fused=True),
        {"0.weight": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}},
    ),
    "adafactor": (
        lambda groups: Adafactor(groups, lr=0.0),
        {"0.weight": {"row_var", "col_var"}, "1.weight": {"variance"}},
    ),
    "nadam": (
        lambda groups: NAdam(groups, lr=0.0),
        {"1.bias": {"exp_avg", "exp_avg_sq", "mu_product"}},  # mu_product is a scalar
    ),
    "8-bit adamw": (
        lambda groups: AdamW8bit(groups, lr=0.0),
        {
            "0.weight": {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"},
            "1.weight": {"state1", "state2"},
        },
    ),
    "muon": (lambda groups: Muon(groups[:1], lr=0.0), {"0.weight": {"momentum_buffer"}, "1.weight": set()}),
    "sgd": (lambda groups: SGD(groups, lr=0.0), {"0.weight": set()}),
}


class Training:
    """A few steps of a tiny model; their gradients depend on their number alone."""

    def __init__(self, make: Callable[..., Optimizer]) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 5))
        weights = list(self.model.parameters())
        matrices = {"params": [w for w in weights if w.ndim == 2], "weight_decay": 0.1}
        self.optimizer = make(
            [matrices, {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}]
        )
        stepped = {id(w) for group in self.optimizer.param_groups for w in group["params"]}
        self.trainable = {n: w for n, w in self.model.named_parameters() if id(w) in stepped}
        self.step = 0

    def go_on(self, until: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2
        while self.step < until:
            self.optimizer.zero_grad()
            draw = torch.Generator().manual_seed(self.step)
            self.model(torch.randn(8, 96, generator=draw)).square().mean().backward()
            self.optimizer.step()
            self.step += 1

    def state(self) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in state_by_name(self.trainable, self.optimizer).items()}

    def save(self, folder: Path) -> None:
        share = share_of(state_by_name(self.trainable, self.optimizer), 0, 1)
        Saver(World()).save(folder, [*share], share.values(), {}, behind=False, lasting=True)

    def load(self, folder: Path, step: int | None) -> None:
        load_state(folder, self.trainable, self.optimizer, step)
        self.step = step or 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_as_if_undisturbed(tmp_path: Path, name: str) -> None:
    make, slots = OPTIMIZERS[name]
    whole, cut = Training(make), Training(make)
    whole.go_on(7)
    cut.go_on(4)
    cut.save(tmp_path)
    resumed = Training(make)
    resumed.load(tmp_path, 4)
    for weight, expected in slots.items():
        assert {key.partition(".")[0] for key in resumed.state() if key.endswith(f".{weight}")} == expected
    resumed.go_on(7)
    expected, found = whole.state(), resumed.state()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_adamws_keys_are_its_moments_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = make_optimizer(model, Train(max_steps=1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = ["0.weight", "0.bias"]
    moments = ["exp_avg.0.weight", "exp_avg_sq.0.weight", "exp_avg.0.bias", "exp_avg_sq.0.bias"]
    assert [*state_by_name(dict(model.named_parameters()), optimizer)] == names + moments


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    written = Training(OPTIMIZERS["adafactor"][0])
    written.go_on(1)
    written.save(tmp_path)
    other = Training(lambda groups: AdamW(groups))
    expected = "it keeps exp_avg, exp_avg_sq, the checkpoint has col_var, row_var, variance"
    with pytest.raises(
        CheckpointError, match=r"do not fit the optimizer, the first is col_var\.0"
    ) as refused:
        other.load(tmp_path, 1)
    assert expected in str(refused.value)
    other.load(tmp_path, None)  # its weights are weights
    assert torch.equal(other.trainable["0.weight"], written.trainable["0.weight"])


def test_slots_that_the_optimizer_does_not_keep_are_refused_too(tmp_path: Path) -> None:
    written = Training(OPTIMIZERS["adamw with amsgrad"][0])
    written.go_on(1)
    written.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"6 tensors .* do not fit the optimizer, the first is max_exp"):
        Training(lambda groups: AdamW(groups)).load(tmp_path, 1)


def test_a_weight_without_a_gradient_so_far_is_saved_and_resumed(tmp_path: Path) -> None:
    written = Training(lambda groups: AdamW(groups))
    written.trainable["2.bias"].requires_grad_(False)
    written.go_on(2)
    written.save(tmp_path)
    resumed = Training(lambda groups: AdamW(groups))
    resumed.load(tmp_path, 2)
    assert not resumed.state()["exp_avg.2.bias"].any()


def test_state_that_is_not_a_tensor_is_refused() -> None:
    class Counting(Adam):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for state in self.state.values():
                state["restarts"] = 1

    training = Training(lambda groups: Counting(groups))
    training.go_on(1)
    with pytest.raises(TrainingError, match=r"its restarts of 0\.weight is of type int, not a tensor"):
        training.state()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("adafactor", r"its row_var of a \(64, 128\) tensor is \(64, 1\)"),
        ("nadam", r"its mu_product of a \(64, 128\) tensor is \(\)"),
        ("8-bit adamw", r"its qmap1 of a \(64, 128\) tensor is \(256,\)"),
        ("muon", "Muon only supports 2D"),
    ],
)
def test_deepspeed_steps_flat_parts_so_other_shapes_are_refused(name: str, why: str) -> None:
    with pytest.raises(JobError, match="does not work under DeepSpeed ZeRO") as refused:
        flat_slots(Training(OPTIMIZERS[name][0]).optimizer, torch.device("cpu"))
    assert refused.match(why)


def test_deepspeed_takes_what_keeps_a_value_for_each_weight() -> None:
    training = Training(OPTIMIZERS["adamw with amsgrad"][0])
    assert flat_slots(training.optimizer, torch.device("cpu")) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
