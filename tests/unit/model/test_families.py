"""Families of models: packed documents have the loss that transformers gives to each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import JobError, ModelError
from raydist.job.schema import Job, Lora
from raydist.model import head
from raydist.model.adapter import add_lora
from raydist.model.attention.choose import set_attention
from raydist.model.build import build_model, fitted_of, load_config, model_sizes, n_parameters, quietly
from raydist.model.experts import QuantizedExperts
from raydist.model.layers import not_of_text
from raydist.model.loss import loss_of
from raydist.model.quantization import load_dequantized, quantization_config
from raydist.model.router import router_of
from raydist.model.work import work_of
from tests.families import FAMILIES, MASKED, MIXTURES, NO_INT4, REFUSED, write_base
from tests.train_parts import VOCABULARY, make_job, write_tokenizer

CPU = torch.device("cpu")
ROWS = ((10, 15, 7), (20, 12))
LORA = {"r": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("words"))


def job_of(base: Path, words: Path, **sections: Any) -> Job:
    model = {"base": str(base), "config": None, "tokenizer": str(words)}
    return make_job(base.parent / "runs", model=model, **sections)


def packed() -> dict[str, Tensor]:
    """Two rows of two and three documents."""
    ids = torch.randint(1, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    lengths = torch.zeros(2, 32, dtype=torch.int32)
    for row, documents in enumerate(ROWS):
        lengths[row, : len(documents)] = torch.tensor(documents)
        labels[row, torch.tensor(documents).cumsum(0) - 1] = -100
    positions = torch.stack([torch.cat([torch.arange(n) for n in documents]) for documents in ROWS])
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "document_lengths": lengths}


def alone(base: Path, batch: dict[str, Tensor]) -> float:
    """The summed loss by transformers, a document at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    total = 0.0
    for row, documents in zip(batch["input_ids"], ROWS, strict=True):
        for document in row.split(list(documents)):
            logits = model(input_ids=document[None], use_cache=False).logits[0]
            total += F.cross_entropy(logits[:-1], document[1:], reduction="sum").item()
    return total


@torch.no_grad()
def loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    return loss_of(model.eval(), batch).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_loss_of_each_alone(family: str, tmp_path: Path, words: Path) -> None:
    base, batch = write_base(family, tmp_path / "base"), packed()
    expected = alone(base, batch)
    for adapter in (None, LORA):
        model = build_model(job_of(base, words, adapter=adapter), words, CPU)
        assert loss(model, batch) == pytest.approx(expected, rel=2e-7)


def test_documents_are_in_the_masks_of_a_model_that_keeps_its_positions_from_them(
    tmp_path: Path, words: Path
) -> None:
    for family in ("llama", "gemma3", *MASKED):
        model = build_model(job_of(write_base(family, tmp_path / family), words), words, CPU)
        assert fitted_of(model).attention.masked == (family in MASKED)
    for name in ("bloom", "mpt"):  # whose positions are in their attention
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
        sizes |= {"d_model": 32, "n_layers": 2, "n_heads": 4} if name == "mpt" else {}
        bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes))
        assert set_attention(bare, CPU, document_mask=True).masked


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_mix_documents_are_refused(family: str) -> None:
    given, said, _ = REFUSED[family]
    settings = {name: value for name, value in given.items() if name != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(given["model_type"], **settings, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=said):
        set_attention(model, CPU, document_mask=True)


# --- multimodal models


def test_of_a_multimodal_model_the_text_side_is_trained(tmp_path: Path, words: Path) -> None:
    base = write_base("gemma3-multimodal", tmp_path / "base")
    others = ["model.vision_tower", "model.multi_modal_projector"]
    for adapter in (None, LORA, {**LORA, "target_modules": ["q_proj", "fc1"]}):
        job = job_of(base, words, adapter=adapter)
        model = build_model(job, words, CPU)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained and not any("vision_tower" in name or "projector" in name for name in trained)
        loss_of(model, packed()).backward()
        assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
        sizes = model_sizes(load_config(job), job)
        assert [*sizes.frozen] == others and sizes.trainable == sum(
            w.numel() for w in model.parameters() if w.requires_grad
        )
    text = build_model(job_of(write_base("gemma3", tmp_path / "text"), words), words, CPU)
    multimodal = build_model(job_of(base, words), words, CPU)
    assert not_of_text(text) == [] and work_of(multimodal) == work_of(text)


def test_positions_of_a_nested_configuration_limit_the_blocks(tmp_path: Path, words: Path) -> None:
    base = write_base("gemma3-multimodal", tmp_path / "base")
    with pytest.raises(JobError, match="block_size 128 is above the model's 64 positions"):
        build_model(job_of(base, words, packing={"block_size": 128}), words, CPU)


def test_layers_that_differ_are_counted_one_by_one() -> None:
    """Gemma 4 has wider heads where a layer sees the whole document."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "global_head_dim": 16}
    sizes |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **sizes, **kinds))
    assert work_of(model).per_pair == {8: 6 * 4 * (8 + 8), None: 6 * 4 * (16 + 16)}


# --- quantization


@pytest.mark.parametrize("family", NO_INT4)
def test_a_quantization_that_would_leave_most_as_it_is_is_refused(
    family: str, tmp_path: Path, words: Path
) -> None:
    job = job_of(write_base(family, tmp_path / "base"), words, adapter=LORA, quantization="int4")
    with pytest.raises(JobError, match=r"int4 would reach \d+% of the layers' weights") as refused:
        model_sizes(load_config(job), job)
    assert refused.value.where == "quantization"


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("family", [*MIXTURES, "deepseek-v3"])
def test_quantized_experts_compute_with_the_numbers_that_their_bytes_stand_for(
    family: str, bits: str, tmp_path: Path, words: Path
) -> None:
    base, batch = write_base(family, tmp_path / "base"), packed()
    job = job_of(base, words, adapter=LORA, quantization=bits)
    ours = build_model(job, words, CPU)
    of_experts = [m for m in ours.modules() if isinstance(m, QuantizedExperts)]
    assert of_experts and not any(w.ndim == 3 for w in ours.parameters())
    plain = load_dequantized(str(base), quantization_config(job), attn_implementation="eager")
    set_attention(plain, CPU, document_mask=True)
    with quietly():
        plain = add_lora(plain, Lora(r=4, dropout=0.0, target_modules=["o_proj"]))
    weights = dict(ours.named_parameters())
    adapted = {name: w for name, w in plain.named_parameters() if w.requires_grad}
    for name, weight in adapted.items():
        weight.data.copy_(weights[name].data)
    expected = loss_of(plain, batch)
    expected.backward()
    found = loss_of(ours, batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.item() != pytest.approx(alone(base, batch), rel=1e-6)  # or nothing was quantized
    assert len(adapted) == 4
    for name, weight in adapted.items():
        torch.testing.assert_close(weights[name].grad, weight.grad, rtol=1e-4, atol=1e-5)
    sizes = model_sizes(load_config(job), job)
    held = sum(w.numel() * w.element_size() for w in ours.parameters())
    assert (sizes.weight_bytes, sizes.trainable) == (held, n_parameters(ours, trainable=True))
    assert len(sizes.without_adapter) == len(of_experts) / 2


def test_experts_are_dequantized_a_layer_at_a_time(tmp_path: Path, words: Path) -> None:
    """And again for the backward pass: what a layer keeps for it is bytes."""
    base = write_base("mixtral", tmp_path / "base", num_hidden_layers=4)
    model = build_model(job_of(base, words, adapter=LORA, quantization="int4"), words, CPU)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, packed())
    assert not any(tensor.ndim == 3 and tensor.shape[0] == 4 for tensor in kept.values())
    experts = [m for m in model.modules() if hasattr(m, "num_experts") and "gate_up_proj" in m.__dict__]
    assert experts == []


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_recomputed_to_the_same_gradients(family: str, tmp_path: Path, words: Path) -> None:
    """gpt-oss adds the bias of experts to their products in place, which must not be kept then."""
    base, batch = write_base(family, tmp_path / "base"), packed()
    for quantization in (None, "int4"):
        gradients = []
        for recomputed in (False, "selective", True):
            given = {"adapter": LORA, "quantization": quantization}
            job = job_of(base, words, **given, train={"gradient_checkpointing": recomputed})
            model = build_model(job, words, CPU)
            loss_of(model, batch).backward()
            gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
        assert gradients[0].norm() > 0.1
        for other in gradients[1:]:
            torch.testing.assert_close(other, gradients[0])


# --- routers


@pytest.mark.parametrize("parts", [False, True], ids=["whole logits", "logits in parts"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_routers_loss_is_added_as_transformers_adds_it(
    family: str, parts: bool, tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "WORTH_ELEMENTS", 0 if parts else 2**26)
    base = write_base(family, tmp_path / "base", output_router_logits=True, router_aux_loss_coef=0.5)
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    ids = packed()["input_ids"]
    found = reference(input_ids=ids, labels=ids, use_cache=False)
    (found.loss * 62).backward()
    batch = {"input_ids": ids, "labels": F.pad(ids[:, 1:], (0, 1), value=-100)}
    batch |= {"position_ids": torch.arange(32).repeat(2, 1)}
    batch |= {"document_lengths": F.pad(torch.full((2, 1), 32, dtype=torch.int32), (0, 31))}
    norm = torch.cat([w.grad.flatten() for w in reference.parameters()]).norm()
    for recomputed in (False, True):
        model = build_model(job_of(base, words, train={"gradient_checkpointing": recomputed}), words, CPU)
        ours = loss_of(model, batch)
        ours.backward()
        assert ours.item() == pytest.approx(62 * found.loss.item(), rel=1e-6)
        gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]).norm()
        assert gradient.item() == pytest.approx(norm.item(), rel=1e-5)
        router = router_of(model)
        assert router is not None and router.sum_seen() == pytest.approx(62 * found.aux_loss.item(), rel=1e-6)
        without = loss(model, batch)  # an evaluation is of the text alone
        assert without == pytest.approx(62 * (found.loss - 0.5 * found.aux_loss).item(), rel=1e-6)


def test_a_job_decides_on_the_routers_loss(tmp_path: Path, words: Path) -> None:
    asks = write_base("mixtral", tmp_path / "asks", output_router_logits=True, router_aux_loss_coef=0.5)
    silent = write_base("mixtral", tmp_path / "silent")

    def coefficient(base: Path, given: float | None) -> float | None:
        model = build_model(job_of(base, words, train={"router_aux_loss_coef": given}), words, CPU)
        router = router_of(model)
        return None if router is None else router.coefficient

    assert [coefficient(asks, None), coefficient(asks, 0.0), coefficient(asks, 0.1)] == [0.5, None, 0.1]
    assert [coefficient(silent, None), coefficient(silent, 0.1)] == [None, 0.1]
    dense = job_of(write_base("llama", tmp_path / "llama"), words, train={"router_aux_loss_coef": 0.1})
    with pytest.raises(JobError, match="LlamaForCausalLM has no loss for its router"):
        model_sizes(load_config(dense), dense)


def test_a_model_that_fails_on_a_packed_block_is_refused_in_our_words() -> None:
    class Broken(nn.Module):
        def forward(self, module: nn.Module, args: Any) -> None:
            raise RuntimeError("the size of tensor a must match the size of tensor b")

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model.transformer.h[0].register_forward_pre_hook(Broken())
    with pytest.raises(ModelError, match="does not take packed blocks"):
        set_attention(model, CPU, document_mask=True)
