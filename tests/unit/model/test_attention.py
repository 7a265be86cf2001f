"""Packed documents do not see each other, in any model that is let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from raydist.errors import JobError, ModelError
from raydist.job.identity import differences
from raydist.job.schema import Lora
from raydist.model.adapter import add_lora
from raydist.model.attention.choose import (
    check_attention,
    check_model_attention,
    set_attention,
    use_attention,
)
from raydist.model.attention.documents import FLASH, flash_arguments, give_documents
from raydist.model.attention.per_document import PER_DOCUMENT
from raydist.model.attention.probe import probe
from raydist.model.build import build_model, quietly
from raydist.model.loss import logits_of
from raydist.model.recompute import checkpoint_layers
from raydist.training.loop import train
from tests.train_parts import LLAMA, losses, make_job, make_spec

CPU = torch.device("cpu")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MODELS = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "mistral": {**GROUPED, "sliding_window": 8},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
MODELS["gemma2"] = {**GROUPED, "head_dim": 8, "sliding_window": 8}
LENGTHS = (13, 1, 30, 20)


def make(kind: str, attention: str | None = None, **options: Any) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **{**MODELS.get(kind, {}), **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention or "eager")
    with torch.no_grad():  # as trained: at their initial scale attention hardly matters
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    if attention is None:
        set_attention(model, CPU, document_mask=True)
    return model.eval()


def packed(lengths: tuple[int, ...], vocabulary: int) -> dict[str, torch.Tensor]:
    """Two blocks with the same documents in opposite orders, so that rows are cut at different places."""
    documents = [torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    positions = [torch.arange(n) for n in lengths]
    rows = (documents, documents[::-1]), (positions, positions[::-1])
    ids, places = (torch.stack([torch.cat(forward), torch.cat(backward)]) for forward, backward in rows)
    row = torch.tensor(lengths, dtype=torch.int32)
    of = F.pad(torch.stack([row, row.flip(0)]), (0, sum(lengths) - len(lengths)))
    return {"input_ids": ids, "position_ids": places, "document_lengths": of}


def one_document(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tokens, each row as one document."""
    rows, length = block["input_ids"].shape
    lengths = F.pad(torch.full((rows, 1), length, dtype=torch.int32), (0, length - 1))
    return {**block, "position_ids": torch.arange(length).repeat(rows, 1), "document_lengths": lengths}


def worst_difference(model: torch.nn.Module, vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> float:
    """Of packed logits from those of each document alone, as a share of the largest logit."""
    with torch.no_grad():
        block = packed(lengths, vocabulary)
        logits, worst, start = logits_of(model, block), 0.0, 0
        for n in lengths:
            piece = slice(start, start + n)
            alone = one_document({"input_ids": block["input_ids"][:1, piece]})
            expected = logits_of(model, alone)[0]
            other = slice(sum(lengths) - start - n, sum(lengths) - start)
            worst = max(
                worst, *((logits[r, p] - expected).abs().max().item() for r, p in ((0, piece), (1, other)))
            )
            start += n
    return worst / logits.abs().max().item()


@pytest.mark.parametrize("kind", MODELS)
def test_packed_logits_are_each_documents_own(kind: str) -> None:
    model = make(kind)
    probe(model, document_mask=True)
    assert worst_difference(model, 99) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_per_document_attention_is_what_runs_on_cpu_and_equals_the_masked_one(kind: str) -> None:
    ours, stock, block = make(kind), make(kind, "sdpa"), packed(LENGTHS, 99)
    assert ours.config._attn_implementation == PER_DOCUMENT
    logits, expected = logits_of(ours, block), logits_of(stock, block)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for model, out in ((ours, logits), (stock, expected)):
        out.square().sum().backward()
        model.norm = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (ours.norm - stock.norm).abs().max() < 1e-5 * stock.norm.abs().max()


def test_without_the_document_mask_attention_is_plainly_causal() -> None:
    model, block = make("llama"), one_document(packed(LENGTHS, 99))
    probe(model, document_mask=False)
    expected = make("llama", "eager")(input_ids=block["input_ids"], use_cache=False).logits
    assert (logits_of(model, block) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "attention"), [("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("gemma2", "eager")]
)
def test_windowed_models_keep_the_masks_of_transformers(kind: str, attention: str) -> None:
    assert make(kind).config._attn_implementation == attention


def test_probe_refuses_a_model_that_attends_across_documents() -> None:
    def leaky(module, query, key, value, mask, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("leaky", leaky)
    model = make("llama", "leaky")
    with pytest.raises(ModelError, match="a document sees the one before it"):
        probe(model, document_mask=True)
    probe(model, document_mask=False)


def test_probe_refuses_a_model_that_sees_the_future() -> None:
    def blind_to_order(module, query, key, value, mask, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("blind_to_order", blind_to_order)
    with pytest.raises(ModelError, match="sees the tokens after it"):
        probe(make("llama", "blind_to_order"), document_mask=False)


def test_probe_refuses_a_model_without_positions_of_its_own() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=99)
    torch.manual_seed(0)
    with pytest.raises(ModelError):
        probe(AutoModelForCausalLM.from_config(config), document_mask=True)


@pytest.mark.real
def test_packed_logits_of_the_real_model(real: Path) -> None:
    path = real / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert set_attention(model, CPU, document_mask=True).name == PER_DOCUMENT
    assert worst_difference(model, 49_152, (70, 1, 150, 35)) < 1e-5


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_named_attention_is_used_exactly_and_gives_the_same_loss(tmp_path: Path, name: str) -> None:
    found = {}
    for asked in ("auto", name):
        spec = make_spec(
            tmp_path,
            run=asked,
            model={"config": LLAMA, "attn_implementation": asked},
            train={"max_steps": 3},
        )
        model = build_model(spec.job, spec.tokenizer, CPU)
        found[asked] = (model.config._attn_implementation, train(spec), losses(spec.run))
    assert (found["auto"][0], found[name][0]) == (PER_DOCUMENT, name)
    assert found[name][2] == pytest.approx(found["auto"][2], abs=1e-5)


def test_flash_attention_is_refused_with_its_reason() -> None:
    with pytest.raises(ModelError, match="runs on GPUs, and the workers are on CPU") as refused:
        check_attention("flash_attention_2", "cpu")
    assert refused.value.where == "model.attn_implementation"
    check_attention("flash_attention_2", "cuda")  # the driver: its packages are not the workers'
    if not is_flash_attn_2_available():
        with pytest.raises(ModelError, match="the package flash-attn is not installed"):
            check_attention("flash_attention_2", "cuda", on_worker=True)
    with pytest.raises(ModelError, match="type bloom has none such"):
        check_model_attention(AutoConfig.for_model("bloom"), "flash_attention_2")
    check_model_attention(AutoConfig.for_model("llama"), "flash_attention_2")


def test_a_named_attention_that_fails_the_probe_is_refused_not_replaced() -> None:
    model = make("gemma2", "eager")  # its soft cap of scores is not what SDPA computes
    with pytest.raises(ModelError, match="sdpa cannot be used as asked") as refused:
        set_attention(model, CPU, document_mask=True, asked="sdpa")
    assert refused.value.why


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_flash_attention_is_given_the_documents_of_a_batch_of_several_rows(kind: str) -> None:
    """The kernel needs a GPU: what stands in for it takes the lengths as the kernel does."""

    def kernel(module, query, key, value, mask, scaling=None, *, cu_seq_lens_q, max_length_q, **kwargs):  # type: ignore[no-untyped-def]
        assert mask is None
        lengths = cu_seq_lens_q.diff().tolist()
        assert max_length_q >= max(lengths) and cu_seq_lens_q.dtype == torch.int32
        flat = [tensor.transpose(0, 1).flatten(1, 2).split(lengths, dim=1) for tensor in (query, key, value)]
        options = {"is_causal": True, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        out = [F.scaled_dot_product_attention(*(t[None] for t in qkv), **options)[0] for qkv in zip(*flat)]  # noqa: B905
        return torch.cat(out, dim=1).transpose(0, 1).unflatten(0, (query.shape[0], -1)), None

    model, expected = make(kind, "eager"), make(kind)
    give_documents(model, FLASH)
    AttentionInterface.register("kernel", kernel)
    AttentionMaskInterface.register("kernel", lambda *args, **kwargs: None)
    model.set_attn_implementation("kernel")
    probe(model, document_mask=True)
    block = packed(LENGTHS, 99)
    assert (logits_of(model, block) - logits_of(expected, block)).abs().max() < 1e-4
    probe(model, document_mask=False)


def test_flash_attention_gets_no_sequence_of_no_length() -> None:
    arguments = flash_arguments([[13, 1, 50], [64]], CPU)
    assert arguments["cu_seq_lens_q"].tolist() == [0, 13, 14, 64, 128]
    assert arguments["cu_seq_lens_k"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 64


def test_documents_are_told_apart_by_their_lengths_once_for_all_layers() -> None:
    """Positions that restart without a document's end do not part it."""
    model, block = make("llama"), packed(LENGTHS, 99)
    joined = {**block, "document_lengths": one_document(block)["document_lengths"]}
    given = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, inputs: given.append(inputs["document_lengths"]), with_kwargs=True
        )
    assert (logits_of(model, block) - logits_of(model, joined)).abs().max() > 1e-2
    assert given[0] is given[1] and given[0] == [list(LENGTHS), list(LENGTHS[::-1])]
    assert given[2:] == [[[64], [64]]] * 2


def test_a_batch_without_lengths_is_refused_where_they_are_needed() -> None:
    model, block = make("llama"), packed(LENGTHS, 99)
    del block["document_lengths"]
    with pytest.raises(ModelError, match="a batch without document_lengths"):
        logits_of(model, block)
    use_attention(model, "sdpa")
    logits_of(model, block)


def test_attention_tried_one_after_the_other_leaves_one_hook() -> None:
    model, seen = make("llama"), {}
    model.model.register_forward_pre_hook(lambda module, args, inputs: seen.update(inputs), with_kwargs=True)
    for name in (PER_DOCUMENT, "sdpa", PER_DOCUMENT, "eager"):
        use_attention(model, name)
        assert len(model._forward_pre_hooks) == 1
    logits_of(model, packed(LENGTHS, 99))
    assert seen["position_ids"].shape == (2, 64) and "document_lengths" not in seen


def test_a_model_that_passes_nothing_on_falls_back_to_masks_and_is_not_given_lengths() -> None:
    class Closed(type(make("llama"))):  # type: ignore[misc]
        def forward(self, input_ids, position_ids, use_cache):  # type: ignore[no-untyped-def]
            return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model, expected = make("llama", "eager"), make("llama")
    model.__class__ = Closed
    assert set_attention(model, CPU, document_mask=True).name == "sdpa"
    block = packed(LENGTHS, 99)
    assert (logits_of(model, block) - logits_of(expected, block)).abs().max() < 1e-4


@pytest.mark.parametrize("attention", [PER_DOCUMENT, "sdpa", FLASH])
def test_documents_reach_the_attention_of_a_model_with_an_adapter(attention: str) -> None:
    model, seen = make("llama"), {}
    if attention != FLASH:  # which needs a GPU: its hook alone is what counts here
        use_attention(model, attention)
    give_documents(model, attention)
    model.model.register_forward_pre_hook(lambda m, args, inputs: seen.update(inputs), with_kwargs=True)
    with quietly():
        adapted, block = add_lora(model, Lora()), packed(LENGTHS, 99)
    if attention == FLASH:
        with pytest.raises(ModelError, match="as this function does"):
            logits_of(adapted, block)
    else:
        assert (logits_of(adapted, block) - logits_of(make("llama"), block)).abs().max() < 1e-4
    assert ("document_lengths" in seen) == (attention == PER_DOCUMENT)
    assert ("cu_seq_lens_q" in seen) == (attention == FLASH)


def test_checkpointed_layers_attend_to_the_same_documents_again() -> None:
    plain, saving, block = make("llama").train(), make("llama").train(), packed(LENGTHS, 99)
    checkpoint_layers(saving, True)
    for model in (plain, saving):
        logits_of(model, block).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_another_attention_is_the_same_run_and_flash_needs_16_bits(tmp_path: Path) -> None:
    auto, eager = (make_job(tmp_path, model={"attn_implementation": name}) for name in ("auto", "eager"))
    assert not differences(auto, eager)
    flash = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(JobError, match="flash_attention_2 computes in 16 bits only"):
        make_job(tmp_path, model=flash)
    assert make_job(tmp_path, model=flash, train={"mixed_precision": "bf16"})
