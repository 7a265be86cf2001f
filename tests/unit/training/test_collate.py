"""The hook on micro batches: what it may do reaches the loss and the model, all else is refused."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from raydist.errors import JobError, RunChanged, TrainingError
from raydist.folder import RunFolder
from raydist.model.loss import logits_of
from raydist.run.lifecycle import keep_collator
from raydist.training.collate import make_collator
from raydist.training.data import open_data
from raydist.training.loop import train
from tests.train_parts import losses, make_spec

Tensors = dict[str, torch.Tensor]
HERE = __name__


def every_second_label(batch: Tensors) -> Tensors:
    batch["labels"][:, ::2] = -100
    return batch


def as_it_is(batch: Tensors) -> Tensors:
    return batch


def shorter(batch: Tensors) -> Tensors:
    return {name: tensor[:, :4] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}


def as_floats(batch: Tensors) -> Tensors:
    return {**batch, "labels": batch["labels"].float()}


def without_labels(batch: Tensors) -> Tensors:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def invented(batch: Tensors) -> Tensors:
    return {**batch, "labels": torch.full_like(batch["labels"], 3)}


def moved(batch: Tensors) -> Tensors:
    return {**batch, "position_ids": batch["position_ids"] + 1}


def merged(batch: Tensors) -> Tensors:
    batch["document_lengths"][0, :2] = torch.tensor([8, 0])
    return batch


def cut_off(batch: Tensors) -> Tensors:
    return {**batch, "document_lengths": batch["document_lengths"][:, :4]}


def without_lengths(batch: Tensors) -> Tensors:
    return {name: tensor for name, tensor in batch.items() if name != "document_lengths"}


def masked(batch: Tensors) -> Tensors:
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def forgot(batch: Tensors) -> None:
    return None


def batch_of(rows: int = 2) -> Tensors:
    ids = torch.arange(rows * 8).view(rows, 8)
    return {
        "input_ids": ids,
        "labels": ids + 1,
        "position_ids": torch.cat([torch.arange(5), torch.arange(3)]).repeat(rows, 1),
        "document_lengths": torch.tensor([5, 3, 0, 0, 0, 0, 0, 0], dtype=torch.int32).repeat(rows, 1),
        "sample": torch.arange(rows),
    }


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (shorter, r"gives input_ids \(2, 4\) of torch.int64; it got \(2, 8\)"),
        (as_floats, r"gives labels \(2, 8\) of torch.float32"),
        (without_labels, "leaves out labels"),
        (invented, "gives labels that are neither those it got nor -100"),
        (moved, "changes position_ids"),
        (merged, "changes document_lengths"),
        (cut_off, r"gives document_lengths \(2, 4\) of torch.int32; it got \(2, 8\)"),
        (masked, "adds attention_mask"),
        (forgot, "does not give a dict of tensors"),
    ],
)
def test_what_a_collator_may_not_do(function: types.FunctionType, told: str) -> None:
    collate = make_collator(f"{HERE}:{function.__name__}")
    assert collate is not None
    with pytest.raises(TrainingError, match=f"{function.__name__} {told}"):
        collate(batch_of())


def test_document_lengths_may_be_left_out_and_stay() -> None:
    collate = make_collator(f"{HERE}:without_lengths")
    assert collate is not None
    assert torch.equal(collate(batch_of())["document_lengths"], batch_of()["document_lengths"])


def test_there_must_be_such_a_function() -> None:
    assert make_collator(None) is None
    with pytest.raises(JobError, match=r"(?s)cannot import.*train\.collator"):
        make_collator(f"{HERE}:missing")


def test_masked_labels_are_neither_in_the_loss_nor_in_what_it_is_divided_by(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name in ("as_it_is", "every_second_label", None):
        collator = name and f"{HERE}:{name}"
        spec = make_spec(tmp_path, run=str(name), train={"max_steps": 3, "collator": collator})
        train(spec)
        found[str(name)] = losses(spec.run)
    assert found["as_it_is"] == found["None"]
    assert found["every_second_label"][1] == pytest.approx(found["None"][1], rel=0.1)  # a mean, not half
    assert found["every_second_label"][3] != found["None"][3]
    feed = open_data(make_spec(tmp_path)).feed
    sizes = {"global_batch_size": 4, "micro_batch_size": 3}
    step = next(feed.loader(0, 1, **sizes, collate=make_collator(f"{HERE}:every_second_label")))
    plain = next(feed.loader(0, 1, **sizes))
    kept = sum(int((of["labels"][:, 1::2] != -100).sum()) for of in plain.micro_batches)
    assert step.n_labels == kept < plain.n_labels and step.n_tokens == plain.n_tokens


def test_a_run_goes_on_with_the_collator_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module, old = tmp_path / "own_hooks.py", "def keep(batch):\n    return batch\n"
    module.write_text(old)
    spec = make_spec(tmp_path, train={"max_steps": 1, "collator": "own_hooks:keep"})
    folder = RunFolder(spec.run)
    folder.path.mkdir()
    keep_collator(spec.job, folder)
    module.write_text("# a first try\n" + old)
    keep_collator(spec.job, folder)  # nothing is trained yet
    train(spec)
    keep_collator(spec.job, folder)
    module.write_text(old)
    with pytest.raises(RunChanged, match=r"(?s)the source of own_hooks:keep differs.*restore its module"):
        keep_collator(spec.job, folder)
    module.write_text("# a first try\n" + old)
    keep_collator(spec.job, folder)
    folder.data_file.write_text('{"sources": {}}')  # of a run that began before sources were kept
    keep_collator(spec.job, folder)


def test_added_keys_reach_the_model() -> None:
    class Model(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            self.given = given
            return types.SimpleNamespace(logits=torch.zeros(2, 8, 3))

    model = Model()
    logits_of(model, {**batch_of(), "token_type_ids": torch.zeros(2, 8)})
    assert set(model.given) == {
        "input_ids",
        "position_ids",
        "document_lengths",
        "token_type_ids",
        "use_cache",
    }
    assert model.given["document_lengths"] == [[5, 3], [5, 3]]
