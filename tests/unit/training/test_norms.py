"""Gradient norms that are not finite end an attempt in time, and no step reads anything from its device."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.errors import TrainingError
from raydist.folder import RunFolder
from raydist.model import head
from raydist.model.build import build_model
from raydist.parallel.ddp import DdpOnGpu
from raydist.parallel.optimizer import clip_, gradient_norm
from raydist.parallel.world import World
from raydist.training import checkpoint
from raydist.training.hooks import Hook
from raydist.training.loop import Attempt, train
from raydist.training.norms import Norms, Taken
from tests.train_parts import make_spec
from tests.unit.model.test_attention import packed

META = torch.device("meta")


@pytest.mark.parametrize("behind", [0, 1])
def test_a_norm_is_read_with_the_step_after_it_or_when_asked(tmp_path: Path, behind: int) -> None:
    def made() -> Norms:
        norms = Norms(RunFolder(tmp_path), World())
        norms.behind = behind
        return norms

    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    norms, loss = made(), torch.tensor(2.5)
    norms.add(good, Taken(1, 0, loss))
    if behind:
        norms.add(bad, Taken(2, 4, loss))
    with pytest.raises(TrainingError, match=r"step 2: the gradient norm is nan, the loss 2\.5") as refused:
        norms.add(good if behind else bad, Taken(2 + behind, 8 if behind else 4, loss))
    assert "from sample 4 on" in refused.value.where
    norms = made()
    norms.behind = 1
    norms.add(torch.tensor(math.inf), Taken(7, 0, loss))
    with pytest.raises(TrainingError, match="step 7"):
        norms.check()


class Behind(Hook):
    """Reads norms as on a GPU, and spoils the weights after a step."""

    def __init__(self, spoil_after: int) -> None:
        self._spoil_after = spoil_after

    def on_start(self, attempt: Attempt) -> None:
        attempt.norms.behind = 1

    def on_step(self, attempt: Attempt, result: Any) -> None:
        if attempt.step == self._spoil_after:
            with torch.no_grad():
                next(iter(attempt.strategy.module.parameters())).fill_(math.nan)


@pytest.mark.parametrize("spoil_after", [3, 4])
def test_no_checkpoint_is_made_after_a_norm_that_is_not_finite(tmp_path: Path, spoil_after: int) -> None:
    saves = {"save_steps": 1, "asynchronous": False}
    spec = make_spec(tmp_path, train={"logging_steps": 100}, checkpoint=saves)
    with pytest.raises(TrainingError, match=f"step {spoil_after + 1}: the gradient norm is nan"):
        train(spec, hooks=[Behind(spoil_after)])
    left = checkpoint.newest_valid(RunFolder(spec.run))
    assert left is not None and left.step == spoil_after


def test_a_step_reads_nothing_from_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on meta have no values: whatever asked for one would raise, where a GPU would be waited for."""
    monkeypatch.setattr(head, "WORTH_ELEMENTS", 0)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    spec = make_spec(tmp_path)
    model = build_model(spec.job, spec.tokenizer, torch.device("cpu")).to_empty(device=META)
    strategy = DdpOnGpu(model, spec.job, World(device=META))
    batch = packed((13, 1, 18), 64)
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    batch = {name: each if name == "document_lengths" else each.to(META) for name, each in batch.items()}
    loss = torch.zeros((), dtype=torch.float64, device=META)
    for last in (False, True):
        loss += strategy.forward_backward(batch, 7, last=last)
    gradients = [p.grad for p in strategy.trainable.values() if p.grad is not None]
    clip_(gradients, gradient_norm(gradients), 1.0)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
