"""FlexAttention: the blocks that it skips, and what it computes. Its backward pass runs on GPUs only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from raydist.errors import ModelError
from raydist.model.attention import flex
from raydist.model.attention.choose import _check_candidate, use_attention
from raydist.model.attention.flex import (
    FLEX,
    _dense,
    attend,
    block_mask,
    block_masks,
    check_flex,
    flex_attention_forward,
    plain_attention,
)
from raydist.model.attention.layers import Asked
from raydist.model.attention.probe import probe
from raydist.model.loss import autocast, logits_of
from tests.unit.model.test_attention import CPU, MODELS, make, packed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's compiler itself
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]
LONG = (130, 1, 300, 69, 12)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int, int]]:
    """(row, block of queries, block of keys)."""
    rows, _, n = counts.shape
    return {
        (b, i, int(j)) for b in range(rows) for i in range(n) for j in indices[b, 0, i, : counts[b, 0, i]]
    }


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize(
    "documents",
    [
        [[100]],
        [[128], [128]],
        [[200, 100], [300], [1] * 300],
        [[128] * 8, [512, 512], [1000, 24], [5, 700, 319]],
    ],
    ids=["shorter than a block", "one block", "a part of a block", "whole blocks"],
)
def test_its_blocks_are_those_that_torch_finds_by_trying_every_pair(
    documents: list[list[int]], window: int | None
) -> None:
    ours, length = block_mask(documents, CPU, window), sum(documents[0])
    expected = create_block_mask(ours.mask_mod, len(documents), None, length, length, device="cpu")
    assert listed(ours.kv_num_blocks, ours.kv_indices) == listed(expected.kv_num_blocks, expected.kv_indices)
    assert ours.full_kv_num_blocks is not None and ours.full_kv_indices is not None
    assert expected.full_kv_num_blocks is not None and expected.full_kv_indices is not None
    assert listed(ours.full_kv_num_blocks, ours.full_kv_indices) == listed(
        expected.full_kv_num_blocks, expected.full_kv_indices
    )


WINDOWED = {"sliding_window": 100}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
ALTERNATING = {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "options", "precision"),
    [
        ("llama", {}, "fp32"),
        ("gpt2", {}, "fp32"),
        ("qwen3", {}, "bf16"),
        ("mistral", WINDOWED, "fp32"),
        pytest.param("gemma2", ALTERNATING, "fp32", marks=pytest.mark.slow),
        ("gpt_oss", {**MODELS["gemma2"], **ALTERNATING, **EXPERTS}, "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_document_is_what_it_is_alone_with_eager_attention(
    kind: str, options: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents over several blocks. Qwen3's norms give queries and keys of fp32 under autocast.

    gemma2 caps its scores, gpt_oss has sinks, and every second layer of both has a window. transformers'
    own gpt_oss lets documents see each other.
    """
    if kind == "gpt_oss":  # compiled on CPU it gives no log-sum-exp, which sinks need
        monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    eager, ours, batch = make(kind, "eager", **options), make(kind, "eager", **options), packed(LONG, 99)
    use_attention(ours, FLEX)
    with torch.no_grad(), autocast(CPU, precision):
        found = logits_of(ours, batch).float()[0]
        documents = batch["input_ids"][0].split(LONG)
        alone = [eager(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float() for ids in documents]
        expected = torch.cat(alone)
    limit = {"fp32": 1e-4, "bf16": 0.1}[precision]
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_scores_are_capped_as_gemma_2_asks() -> None:
    documents = [[200, 56], [256]]
    query, key, value = (4 * torch.randn(2, 3, 256, 16) for _ in range(3))
    found, _ = flex_attention_forward(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.25,
        softcap=5.0,
        raydist_block_masks=block_masks(documents, CPU),
    )
    scores = torch.tanh(query @ key.transpose(-1, -2) * 0.25 / 5.0) * 5.0
    expected = scores.masked_fill(~_dense(documents, CPU), -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_its_gradients_are_those_of_plain_attention(
    with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompiled, which is torch's own definition of it: compiled it has a backward pass on GPUs only."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    documents = [[200, 56], [256]]
    query, key, value = (torch.randn(2, heads, 256, 16, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    asked = [query, key, value, *([] if sinks is None else [sinks])]
    upstream = torch.randn(2, 4, 256, 16)
    ours = attend(query, key, value, block_mask(documents, CPU, 70), sinks=sinks)
    plain = plain_attention(query, key, value, _dense(documents, CPU, 70), sinks)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(
        torch.autograd.grad(ours, asked, upstream), torch.autograd.grad(plain, asked, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_it_passes_the_probe() -> None:
    model = make("llama", "eager")
    use_attention(model, FLEX)
    probe(model, document_mask=True)


def test_it_is_passed_over_with_a_reason() -> None:
    other = make("llama", "eager")
    other.config.sliding_window = 8
    with pytest.raises(ModelError, match="do not say which window they see"):
        _check_candidate(FLEX, other, CPU, document_mask=True)
    other.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="layers of this model have linear_attention"):
        _check_candidate(FLEX, other, CPU, document_mask=True)
    with pytest.raises(ModelError, match="every row is one document"):
        _check_candidate(FLEX, make("llama", "eager"), CPU, document_mask=False)
    heads = make("llama", "eager").config
    with pytest.raises(ModelError, match=r"does not run on this device: NotImplementedError: .*CPU"):
        check_flex(heads, CPU, Asked())  # also where no call was heard
