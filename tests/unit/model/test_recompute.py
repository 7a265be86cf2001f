"""Gradient checkpointing: what it keeps, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import JobError, ModelError
from raydist.job.schema import Lora
from raydist.model.adapter import add_lora
from raydist.model.attention.choose import set_attention
from raydist.model.build import quietly
from raydist.model.layers import layers_of
from raydist.model.loss import loss_of
from raydist.model.recompute import PRODUCTS, SELECTIVE, _keep_products, checkpoint_layers
from raydist.parallel.footprint import kept_values
from tests.train_parts import LLAMA, VOCABULARY, make_job

CHOICES: tuple[Any, ...] = (False, SELECTIVE, 2, True)


class Kept(TorchDispatchMode):
    """Bytes of what was computed and is still referred to.

    `saved_tensors_hooks` would not see what a selectively recomputed layer keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(n for storage, n in self._made.values() if not storage.expired())


def model(
    which: Any, *, lora: bool = False, attention: str = "auto", dropout: float = 0.1, **sizes: int
) -> nn.Module:
    torch.manual_seed(0)
    options = {k: v for k, v in LLAMA.items() if k != "model_type"}
    options |= {"num_hidden_layers": 4, "attention_dropout": dropout, **sizes}
    bare = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **options, vocab_size=VOCABULARY), attn_implementation="eager"
    )
    set_attention(bare, torch.device("cpu"), document_mask=True, asked=attention)
    with quietly():
        whole: nn.Module = add_lora(bare, Lora(r=4, dropout=0.1)) if lora else bare
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    checkpoint_layers(whole, which)
    return whole.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (4, 65), generator=torch.Generator().manual_seed(2))
    lengths = torch.zeros(4, 64, dtype=torch.int32)
    lengths[:, :2] = torch.tensor([40, 24])
    positions = torch.cat([torch.arange(40), torch.arange(24)]).repeat(4, 1)
    labels, inputs = ids[:, 1:], ids[:, :-1]
    return {"input_ids": inputs, "labels": labels, "position_ids": positions, "document_lengths": lengths}


def passes(trained: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients by name."""
    torch.manual_seed(3)
    loss = loss_of(trained, batch())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


def bytes_between_passes(trained: nn.Module) -> int:
    with Kept() as kept:
        loss = loss_of(trained, batch())
        between = kept.bytes()
    loss.backward()
    return between


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_loss_and_gradients_are_bit_for_bit_the_same_with_dropout(lora: bool) -> None:
    expected_loss, expected = passes(model(False, lora=lora))
    for which in CHOICES[1:]:
        loss, gradients = passes(model(which, lora=lora))
        assert loss == expected_loss
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_each_choice_keeps_less_than_the_one_before() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 176}
    kept = [bytes_between_passes(model(which, dropout=0.0, **wide)) for which in CHOICES]
    assert kept == sorted(set(kept), reverse=True)
    assert kept[-1] < 0.3 * kept[0]


def test_names_stay_and_evaluation_keeps_nothing() -> None:
    plain, saving = model(False), model(SELECTIVE)
    assert [*plain.state_dict()] == [*saving.state_dict()]
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in saving.named_parameters()]
    with torch.no_grad():
        assert torch.equal(loss_of(saving.eval(), batch()), loss_of(plain.eval(), batch()))


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
@pytest.mark.parametrize("which", [True, SELECTIVE])
def test_a_layer_compiles_with_its_recomputation(which: Any) -> None:
    """Checkpointing within, compilation around it: each layer is one graph."""
    plain, compiled = (model(each, attention="sdpa", dropout=0.0) for each in (False, which))
    for layer in layers_of(compiled):
        layer.compile(backend="aot_eager", fullgraph=True)
    expected, found = passes(plain), passes(compiled)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_products_and_every_attention_are_kept() -> None:
    """Those of GPUs too, which cannot run here."""

    @torch.library.custom_op("raydist_test::varlen_attention", mutates_args=())
    def varlen_attention(x: Tensor) -> Tensor:
        return x.clone()

    aten = torch.ops.aten
    kept = [
        *(aten.mm.default, aten.addmm.default, aten.bmm.default, flex_attention),
        *(aten._scaled_dot_product_cudnn_attention.default, aten._flash_attention_forward.default),
        *(
            aten._scaled_dot_product_efficient_attention.default,
            torch.ops.raydist_test.varlen_attention.default,
        ),
    ]
    recomputed = [aten.add.Tensor, aten.silu.default, aten.native_layer_norm.default, aten._to_copy.default]
    for operator in kept:
        assert _keep_products(frozenset(PRODUCTS), None, operator) == CheckpointPolicy.MUST_SAVE, operator
    for operator in recomputed:
        assert _keep_products(frozenset(PRODUCTS), None, operator) == CheckpointPolicy.PREFER_RECOMPUTE, (
            operator
        )


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot recompute its activations"):
        checkpoint_layers(nn.Sequential(nn.Linear(2, 2)), True)


@pytest.mark.parametrize("which", [0, 1, -2, 2.5, "all", None])
def test_other_values_are_refused_with_those_that_there_are(which: Any, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"gradient_checkpointing: true, false, selective, or n from 2 on"):
        make_job(tmp_path, train={"gradient_checkpointing": which})


def test_the_estimate_has_the_same_order(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, train={"gradient_checkpointing": which}) for which in CHOICES]
    assert [kept_values(job.train, 4) for job in jobs] == [68, 48, 38, 8]
    assert [job.train.gradient_checkpointing for job in jobs] == [*CHOICES]
