"""The count of a model's work against what torch counts while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.model.build import build_model
from raydist.model.loss import loss_of
from raydist.model.work import Work, visible_pairs, work_of
from tests.train_parts import LLAMA, VOCABULARY, make_job, write_tokenizer

CPU = torch.device("cpu")
ROWS, LENGTH = 2, 24
LAYERS, HIDDEN = LLAMA["num_hidden_layers"], LLAMA["hidden_size"]
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
KINDS = ["sliding_attention", "full_attention"]
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}


def built(
    folder: Path, config: dict[str, Any], adapter: dict[str, Any] | None = None, **more: Any
) -> nn.Module:
    """A model as an attempt has it, with attention that computes every pair of a row."""
    base = folder / "base"
    options = {name: value for name, value in config.items() if name != "model_type"}
    torch.manual_seed(1)
    made = AutoConfig.for_model(config["model_type"], **options, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(made).save_pretrained(base)
    tokenizer = write_tokenizer(folder / "words")
    model = {"config": None, "base": str(base), "tokenizer": str(tokenizer), "attn_implementation": "eager"}
    return build_model(make_job(folder, model=model, adapter=adapter, **more), tokenizer, CPU)


def counted(model: nn.Module) -> dict[str, int]:
    """Operations of a step by operator: one document a row, every input labelled."""
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    lengths = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    lengths[:, 0] = LENGTH
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1)}
    with FlopCounterMode(display=False) as counter:
        loss_of(model, {**batch, "document_lengths": lengths}).backward()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def check(model: nn.Module, skipped: int = 0) -> None:
    """skipped: operations an input that the definition counts and torch does not make."""
    work, found = work_of(model), counted(model)
    every_pair = ROWS * LENGTH**2  # also of inputs and those that follow them
    assert found.pop("aten.bmm") == sum(work.per_pair.values()) * every_pair
    assert sum(found.values()) == (work.per_input - skipped) * ROWS * LENGTH
    pairs = ROWS * LENGTH * (LENGTH + 1) // 2
    lengths = np.full(ROWS, LENGTH)
    assert work.flops(ROWS * LENGTH, lengths) == work.per_input * ROWS * LENGTH + work.per_pair[None] * pairs


@pytest.mark.parametrize("tied", [False, True])
def test_of_full_training_it_counts_what_torch_counts(tmp_path: Path, tied: bool) -> None:
    model = built(tmp_path, {**LLAMA, "tie_word_embeddings": tied})
    check(model)
    lookup = 0 if tied else VOCABULARY * HIDDEN
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2) - lookup
    assert work_of(model).per_input == 6 * products


def test_a_frozen_base_counts_four_and_its_adapter_six(tmp_path: Path) -> None:
    model = built(tmp_path, LLAMA, LORA)
    first = model.get_submodule("base_model.model.model.layers.0.self_attn")
    unneeded = [first.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    below = [each.get_submodule(part) for each in unneeded for part in ("base_layer", "lora_A.default")]
    check(model, skipped=sum(2 * layer.weight.numel() for layer in below))  # type: ignore[operator, union-attr, misc]


def test_weights_that_are_packed_into_four_bits_count_as_many(tmp_path: Path) -> None:
    plain = work_of(built(tmp_path / "plain", LLAMA, LORA))
    assert work_of(built(tmp_path / "int4", LLAMA, LORA, quantization="int4")) == plain


def test_experts_count_as_far_as_an_input_goes_through_them(tmp_path: Path) -> None:
    model = built(tmp_path, MIXTRAL)
    model.set_experts_implementation("eager")  # type: ignore[operator]  # torch does not count grouped products
    check(model)


def test_attention_falls_with_the_documents_length() -> None:
    work = Work(per_input=0, per_pair={None: 3})
    assert work.flops(64, np.array([64])) == 3 * 64 * 65 / 2
    halves = [work.flops(64, np.full(64 // n, n)) for n in (64, 32, 16, 1)]
    assert halves == sorted(halves, reverse=True) and halves[-1] == 3 * 64


def test_a_window_limits_what_an_input_sees() -> None:
    for length in range(1, 9):
        seen = sum(min(place, 3) for place in range(1, length + 1))
        assert visible_pairs(np.array([length]), 3) == seen
    assert visible_pairs(np.array([5, 2], np.int32)) == 15 + 3
    assert visible_pairs(np.array([], np.int64)) == 0


@pytest.mark.parametrize(
    ("kind", "options", "layers"),
    [
        ("mistral", {"sliding_window": 8}, {8: 2}),
        ("mistral", {"sliding_window": None}, {None: 2}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, {None: 2}),
        ("gemma2", {"layer_types": KINDS, "sliding_window": 8, "head_dim": 8}, {8: 1, None: 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, {None: 1}),
    ],
)  # fmt: skip
def test_layers_see_what_their_kind_says(
    kind: str, options: dict[str, Any], layers: dict[int | None, int]
) -> None:
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"}
    config = AutoConfig.for_model(kind, **{**sizes, **options}, vocab_size=VOCABULARY)
    with torch.device("meta"):
        work = work_of(AutoModelForCausalLM.from_config(config))
    of_a_layer = 3 * 2 * 2 * LLAMA["hidden_size"]
    assert work.per_pair == {window: n * of_a_layer for window, n in layers.items()}
