"""FlexAttention: the blocks that it skips, and what it computes. Its backward pass runs on GPUs only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from raydist.errors import ModelError
from raydist.model.attention.choose import _check_candidate, use_attention
from raydist.model.attention.flex import FLEX, _dense, block_mask, check_flex, flex_attention_forward
from raydist.model.attention.probe import probe
from raydist.model.loss import autocast, logits_of
from tests.unit.model.test_attention import CPU, make, packed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler itself
LONG = (130, 1, 300, 69, 12)


def listed(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int, int]]:
    """(row, block of queries, block of keys)."""
    rows, _, n = counts.shape
    return {
        (b, i, int(j)) for b in range(rows) for i in range(n) for j in indices[b, 0, i, : counts[b, 0, i]]
    }


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
def test_its_blocks_are_those_that_torch_finds_by_trying_every_pair(documents: list[list[int]]) -> None:
    ours, length = block_mask(documents, CPU), sum(documents[0])
    expected = create_block_mask(ours.mask_mod, len(documents), None, length, length, device="cpu")
    assert listed(ours.kv_num_blocks, ours.kv_indices) == listed(expected.kv_num_blocks, expected.kv_indices)
    assert ours.full_kv_num_blocks is not None and ours.full_kv_indices is not None
    assert expected.full_kv_num_blocks is not None and expected.full_kv_indices is not None
    assert listed(ours.full_kv_num_blocks, ours.full_kv_indices) == listed(
        expected.full_kv_num_blocks, expected.full_kv_indices
    )


@pytest.mark.parametrize(("kind", "precision"), [("llama", "fp32"), ("gpt2", "fp32"), ("qwen3", "bf16")])
def test_it_computes_what_eager_attention_does(kind: str, precision: str) -> None:
    """Documents over several blocks. Qwen3's norms give queries and keys of fp32 under autocast."""
    eager, ours, batch = make(kind, "eager"), make(kind, "eager"), packed(LONG, 99)
    use_attention(ours, FLEX)
    with torch.no_grad(), autocast(CPU, precision):
        expected, found = logits_of(eager, batch).float(), logits_of(ours, batch).float()
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
        raydist_block_mask=block_mask(documents, CPU),
    )
    scores = torch.tanh(query @ key.transpose(-1, -2) * 0.25 / 5.0) * 5.0
    expected = scores.masked_fill(~_dense(documents, CPU), -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_it_passes_the_probe() -> None:
    model = make("llama", "eager")
    use_attention(model, FLEX)
    probe(model, document_mask=True)


def test_it_is_passed_over_with_a_reason() -> None:
    with pytest.raises(ModelError, match="a window, which is left to transformers' masks"):
        _check_candidate(FLEX, make("mistral", "eager"), CPU, document_mask=True)
    with pytest.raises(ModelError, match="every row is one document"):
        _check_candidate(FLEX, make("llama", "eager"), CPU, document_mask=False)
    heads = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    with pytest.raises(ModelError, match=r"does not run on this device: NotImplementedError: .*CPU"):
        check_flex(heads, CPU)
