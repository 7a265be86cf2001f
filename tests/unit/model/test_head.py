"""The loss without whole logits: what follows the head, equal gradients, little memory, every strategy."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.files import read_jsonl
from raydist.job.schema import Lora
from raydist.model import head as module
from raydist.model.adapter import add_lora
from raydist.model.attention.choose import set_attention
from raydist.model.build import quietly
from raydist.model.cross_entropy import summed_cross_entropy
from raydist.model.head import Head, find_head, has_chunked_head, rows_at_once, use_chunked_head
from raydist.model.loss import autocast, logits_of, loss_of, token_losses
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from raydist.training.torchrun import torchrun_world, train_rank
from tests.train_parts import LLAMA, finish, fork_ranks, losses, make_spec
from tests.unit.model.test_attention import CPU, GROUPED, LENGTHS, SMALL, packed

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS: dict[str, tuple[dict[str, Any], Head | None]] = {
    "llama": (GROUPED, Head()),
    "qwen3": ({**GROUPED, "head_dim": 16}, Head()),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **NO_DROPOUT}, Head()),
    "phi": (SMALL, Head()),  # with a bias
    "gemma2": ({**GROUPED, "head_dim": 8, "final_logit_softcapping": 5.0}, Head(cap=5.0)),
    "cohere": ({**GROUPED, "logit_scale": 0.25}, Head(scale=0.25)),
    "granite": ({**GROUPED, "logits_scaling": 8.0}, Head(scale=0.125)),
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the small vocabularies here."""
    monkeypatch.setattr(module, "WORTH_ELEMENTS", 0)


def make(kind: str, tied: bool | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {**KINDS[kind][0], **({} if tied is None else {"tie_word_embeddings": tied})}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **options), attn_implementation="eager"
    )
    with torch.no_grad():  # so that logits are large enough for a cap to bend them
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.train()


def a_batch() -> dict[str, torch.Tensor]:
    batch = packed(LENGTHS, 99)
    labels = batch["input_ids"].roll(-1, 1)
    labels[:, ::7] = -100
    return {**batch, "labels": labels}


def a_llama(tied: bool | None = None) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Head]:
    """With its attention, a batch for it, and what was found of its head."""
    model = make("llama", tied)
    found = find_head(model)
    assert found is not None
    set_attention(model, CPU, document_mask=True)
    return model, a_batch(), found


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 100).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """By torch's own cross-entropy of all logits in fp32."""
    logits = logits_of(model, batch).float().flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_head_is_found_and_the_gradients_are_those_of_whole_logits(kind: str) -> None:
    model, batch = make(kind), a_batch()
    found = find_head(model)
    assert found == KINDS[kind][1]
    set_attention(model, CPU, document_mask=True)
    expected_loss = whole_loss(model, batch)
    expected = gradients(model, expected_loss)
    use_chunked_head(model, found)
    assert has_chunked_head(model, batch["labels"].numel())
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    ours = gradients(model, loss)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        limit = 1e-5 * expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= limit, name
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model.eval(), batch), expected_loss, rtol=1e-5, atol=0)
        assert_losses_by_token(model, batch)


def assert_losses_by_token(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    logits, labels = logits_of(model, batch).float().flatten(0, 1), batch["labels"]
    each = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(token_losses(model, batch), each, rtol=1e-5, atol=1e-5)
    assert (each[labels < 0] == 0).all() and (labels < 0).any()


def test_a_head_that_does_something_else_is_left_alone() -> None:
    model = make("llama")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits.clamp(max=30)
        return output

    model.forward = forward  # type: ignore[method-assign]
    assert find_head(model) is None
    assert loss_of(model, {k: v for k, v in a_batch().items() if k != "document_lengths"}) > 0
    plain = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    assert not has_chunked_head(plain, 10**9)


@pytest.mark.parametrize(
    ("tied", "target"),
    [(False, "all-linear"), (True, "all-linear"), (False, ["q_proj", "lm_head"])],
    ids=["frozen head", "frozen and tied", "LoRA on the head"],
)
def test_under_lora(tied: bool, target: str | list[str]) -> None:
    model, batch, found = a_llama(tied)
    use_chunked_head(model, found)
    with quietly():
        adapted = add_lora(model, Lora(r=4, dropout=0.0, target_modules=target))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = gradients(adapted, whole_loss(adapted, batch))
    ours = gradients(adapted, loss_of(adapted, batch))
    with torch.no_grad():
        assert_losses_by_token(adapted, batch)
    assert ours.keys() == expected.keys() and any("lora_A" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max()
        )


def test_under_autocast_the_sums_are_fp32() -> None:
    """The head computes in bf16, and is as near to fp32 as whole logits in bf16 are."""
    model, batch, found = a_llama()
    exact = gradients(model, whole_loss(model, batch))["lm_head.weight"]
    with autocast(CPU, "bf16"):
        whole = gradients(model, summed_cross_entropy(logits_of(model, batch), batch["labels"]))
    use_chunked_head(model, found)
    with autocast(CPU, "bf16"):
        loss = loss_of(model, batch)
    assert loss.dtype == torch.float32
    ours = gradients(model, loss)["lm_head.weight"]
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1.2 * (whole["lm_head.weight"] - exact).norm()


def test_logits_of_a_small_vocabulary_are_whole_and_of_a_large_one_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert rows_at_once(8192, 8192) == 8192
    assert rows_at_once(8192, 131_072) == 683
    assert rows_at_once(10**6, 131_072) == 2048  # a gibibyte in fp32


def test_in_fp16_small_gradients_are_not_lost_before_they_are_scaled() -> None:
    model, batch, found = a_llama()
    exact = gradients(model, whole_loss(model, batch))["lm_head.weight"]
    use_chunked_head(model, found)
    with torch.autocast("cpu", torch.float16):
        scaled = loss_of(model, batch) * 2.0**10
    ours = gradients(model, scaled)["lm_head.weight"] / 2.0**10
    assert (ours - exact).norm() < 0.02 * exact.norm()


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, but for `known`."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known = StorageWeakRef(known.untyped_storage())
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes.pop(self.known, None)
        self.most = max(self.most, sum(self.sizes.values()))
        return output


def peak_bytes(work: Callable[[], None], weight: torch.Tensor) -> int:
    with Live(weight) as live:
        work()
    return live.most


def test_a_large_vocabulary_takes_a_tenth_of_the_memory() -> None:
    """128k entries, frozen: the gradient of a trained head is there either way."""
    rows, width, vocabulary = 64, 8, 131_072
    linear = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    labels = torch.randint(vocabulary, (rows,))

    def naive() -> None:
        hidden = torch.randn(rows, width, requires_grad=True)
        F.cross_entropy(linear(hidden).float(), labels, reduction="sum").backward()

    def chunked() -> None:
        hidden = torch.randn(rows, width, requires_grad=True)
        module._HeadLoss.apply(hidden, linear.weight, None, labels, Head()).backward()  # type: ignore[no-untyped-call]

    assert peak_bytes(chunked, linear.weight) < 0.1 * peak_bytes(naive, linear.weight)


CASES = [
    ({"name": "ddp"}, False),
    ({"name": "fsdp"}, True),
    pytest.param({"name": "zero", "stage": 2}, False, marks=pytest.mark.slow),
    ({"name": "zero", "stage": 3}, True),
]


def train_chunked(spec: AttemptSpec) -> None:
    """One rank of a run whose head is chunked, small as it is."""
    calls: list[int] = []
    plain = module.loss_and_gradient
    module.WORTH_ELEMENTS = 0
    module.loss_and_gradient = lambda *args, **more: calls.append(1) or plain(*args, **more)  # type: ignore[func-returns-value]
    with torchrun_world() as world:
        train_rank(spec, world)
    assert calls, "the head was not chunked"


@pytest.mark.parametrize(("strategy", "tied"), CASES, ids=["ddp", "fsdp, tied", "zero 2", "zero 3, tied"])
def test_every_strategy_trains_with_it(strategy: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Two ranks, against one process with whole logits."""
    more: dict[str, Any] = {
        "model": {"config": {**LLAMA, "tie_word_embeddings": tied}},
        "train": {"max_steps": 6, "global_batch_size": 5},
        "checkpoint": {"save_steps": 100},
    }
    whole = make_spec(tmp_path, run="whole", **more)
    train(whole)
    spec = make_spec(tmp_path, run="chunked", world_size=2, strategy=strategy, **more)
    work = tmp_path / "work.pickle"
    work.write_bytes(pickle.dumps(functools.partial(train_chunked, spec)))
    finish(fork_ranks(work, 2))
    assert losses(spec.run) == pytest.approx(losses(whole.run), rel=1e-5)
    ends = [r for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "eval"]
    assert len(ends) == 2
