"""Loss, schedules, clipping: each against arithmetic of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from raydist.errors import TrainingError
from raydist.job.schema import Train
from raydist.model import loss
from raydist.model.loss import summed_cross_entropy
from raydist.parallel.optimizer import clip_, gradient_norm, make_optimizer, refuse_non_finite
from raydist.training.schedule import learning_rate


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_summed_cross_entropy_is_torchs(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 11 * rows_at_once)
    logits = torch.randn(2, 5, 11, requires_grad=True)
    reference = logits.detach().clone().requires_grad_()
    labels = torch.tensor([[1, -100, 3, 10, 0], [-100, -100, -100, 2, 2]])
    ours = summed_cross_entropy(logits, labels) / 7
    theirs = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="sum") / 7
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-5, atol=1e-8)
    assert (logits.grad[0, 1] == 0).all()


def test_a_batch_of_padding_has_loss_and_gradient_zero() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    total = summed_cross_entropy(logits, torch.full((1, 4), -100))
    total.backward()
    assert total == 0
    assert (logits.grad == 0).all()


def rates(steps: int, **options: Any) -> list[float]:
    train = Train(max_steps=steps, lr=1.0, **options)
    return [learning_rate(step, steps, train) for step in range(steps)]


def test_warm_up_rises_to_the_peak_and_wastes_no_step() -> None:
    found = rates(100, scheduler="constant", warmup_ratio=0.1)
    assert found[:10] == [pytest.approx((i + 1) / 11) for i in range(10)]
    assert found[10:] == [1.0] * 90


def test_cosine_and_linear_fall_to_the_least_rate() -> None:
    cosine = rates(100, scheduler="cosine", warmup_ratio=0, min_lr_ratio=0.1)
    linear = rates(100, scheduler="linear", warmup_ratio=0, min_lr_ratio=0.1)
    for found in (cosine, linear):
        assert found[0] == 1.0
        assert found == sorted(found, reverse=True)
    assert cosine[50] == linear[50] == pytest.approx(0.55)
    assert cosine[25] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert linear[99] == pytest.approx(0.1 + 0.9 * 0.01)


def test_wsd_is_stable_and_then_decays() -> None:
    found = rates(100, scheduler="wsd", warmup_ratio=0.05, decay_ratio=0.2, min_lr_ratio=0.5)
    assert found[5:81] == [1.0] * 76
    assert found[90] == pytest.approx(0.75)
    assert found[99] == pytest.approx(0.525)


def test_the_gradient_norm_is_exact_where_fp32_is_not() -> None:
    gradients = [torch.full((3_000_000,), 1e-3), torch.tensor([0.5])]
    expected = math.sqrt(3_000_000 * float(torch.tensor(1e-3).double()) ** 2 + 0.25)
    assert gradient_norm(gradients).item() == pytest.approx(expected, rel=1e-7)


def test_clipping_scales_only_what_is_above_the_limit() -> None:
    gradient = torch.tensor([3.0, 4.0])
    clip_([gradient], 5.0, 6.0)
    assert gradient.tolist() == [3.0, 4.0]
    clip_([gradient], 5.0, 1.0)
    assert gradient.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_gradients_that_are_no_numbers_stop_the_training(norm: float) -> None:
    with pytest.raises(TrainingError, match="gradient norm"):
        refuse_non_finite(norm)


def test_weight_decay_is_for_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, 0.1).param_groups
        for p in group["params"]
    }
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
