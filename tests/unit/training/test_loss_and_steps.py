"""Loss, schedules, clipping: each against arithmetic of its own."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from raydist.job.schema import Train
from raydist.model import loss
from raydist.model.build import build_model
from raydist.model.cross_entropy import CHUNK_ELEMENTS, summed_cross_entropy
from raydist.parallel.optimizer import clip_, gradient_norm, make_optimizer
from raydist.parallel.world import World
from raydist.training.data import open_data
from raydist.training.evaluate import evaluate
from raydist.training.schedule import learning_rate
from tests.train_parts import make_spec


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_summed_cross_entropy_is_torchs(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 11 * rows_at_once)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_a_batch_is_summed_in_fp32_whatever_the_model_computes_in(precision: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    lengths = torch.tensor([[4, 2, 0, 0, 0, 0], [2, 4, 0, 0, 0, 0]], dtype=torch.int32)
    labels = torch.where(positions.roll(-1, 1) == 0, -100, ids.roll(-1, 1))
    batch = {"input_ids": ids, "position_ids": positions, "document_lengths": lengths, "labels": labels}
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    given = {}

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
            given.update(others)
            return SimpleNamespace(logits=model(input_ids))

    with loss.autocast(torch.device("cpu"), precision):
        found = loss.loss_of(Model(), batch)
        logits = model(ids)
    assert logits.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert found.dtype == torch.float32 and found.shape == ()
    assert torch.equal(found, summed_cross_entropy(logits, labels))
    assert given["document_lengths"] == [[4, 2], [2, 4]] and "labels" not in given
    found.backward()
    expected = torch.autograd.grad(summed_cross_entropy(logits, labels), list(model.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_an_evaluation_is_the_mean_over_all_labels_of_all_ranks(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    model, (data,) = build_model(spec.job, spec.tokenizer, torch.device("cpu")), open_data(spec).eval_sets
    batches = [batch for rank in range(3) for batch in data.batches(rank, 3, 2)]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert (labels != -100).sum() == data.n_labels
    with torch.no_grad():
        logits = torch.cat([loss.logits_of(model, batch).flatten(0, 1) for batch in batches])
    heard: list[tuple[int, int]] = []
    (found,) = evaluate(model, [data], World(), 2, "fp32", lambda *at: heard.append(at))
    assert heard[-1] == (data.n_labels, data.n_labels) and heard == sorted(heard) and len(set(heard)) > 1
    assert found.eval_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


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
    clip_([gradient], torch.tensor(5.0), 6.0)
    assert gradient.tolist() == [3.0, 4.0]
    clip_([gradient], torch.tensor(5.0), 1.0)
    assert gradient.tolist() == pytest.approx([0.6, 0.8])


def test_weight_decay_is_for_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, Train(max_steps=1, weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
