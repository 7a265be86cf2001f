"""LoRA on an unquantized base: its frozen linear layers are held in what they compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import ModelError
from raydist.job.schema import Lora
from raydist.model import adapter
from raydist.model.build import build_model, load_config, model_sizes
from raydist.parallel import build as on_ranks
from raydist.training.loop import train
from tests.train_parts import LLAMA, VOCABULARY, losses, make_job, make_spec, write_tokenizer
from tests.weights import weight_hash

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CPU = torch.device("cpu")


def write_base(folder: Path, config: dict[str, Any], **more: Any) -> Path:
    """A pretrained model in fp32."""
    options = {key: value for key, value in {**config, **more}.items() if key != "model_type"}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **options, vocab_size=VOCABULARY), dtype=torch.float32
    )
    model.save_pretrained(folder)
    return write_tokenizer(folder)


def lora(base: Path) -> dict[str, Any]:
    return {
        "model": {"base": str(base), "config": None, "tokenizer": None},
        "adapter": {"r": 4, "dropout": 0.0},
    }


def in_16_bits(model: nn.Module) -> set[str]:
    """The kinds of modules with such weights."""
    return {
        type(module).__name__
        for module in model.modules()
        for weight in module.parameters(recurse=False)
        if weight.dtype == torch.bfloat16
    }


@pytest.mark.parametrize(
    ("config", "tied", "narrow"), [(LLAMA, False, "Linear"), (LLAMA, True, "Linear"), (GPT2, True, "Conv1D")]
)
def test_frozen_products_are_held_in_16_bits_and_train_the_same_bits(
    config: dict[str, Any], tied: bool, narrow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", config, tie_word_embeddings=tied)
    built: list[nn.Module] = []

    def keep(*args: Any, **options: Any) -> nn.Module:
        built.append(build_model(*args, **options))
        return built[-1]

    monkeypatch.setattr(on_ranks, "build_model", keep)
    options = {"train": {"max_steps": 2, "mixed_precision": "bf16"}, **lora(base)}
    now = make_spec(tmp_path, run="now", **options)
    train(now)
    assert in_16_bits(built[0]) == {narrow}
    head = built[0].get_base_model().get_output_embeddings()
    assert head.weight.dtype == (torch.float32 if tied else torch.bfloat16)
    monkeypatch.setattr(adapter, "narrow_frozen", lambda model, dtype: None)
    before = make_spec(tmp_path, run="before", **options)
    train(before)
    assert in_16_bits(built[1]) == set()
    assert losses(now.run) == losses(before.run)
    assert weight_hash(now.run / "model") == weight_hash(before.run / "model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_memory_of_the_weights_is_foreseen(tied: bool, precision: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", LLAMA, tie_word_embeddings=tied)
    job = make_job(tmp_path, **lora(base), train={"mixed_precision": precision})
    model = build_model(job, base, CPU)
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert model_sizes(load_config(job), job).weight_bytes == held


@pytest.mark.filterwarnings("ignore")  # of peft, which raydist.model.build.quietly silences
def test_dropout_on_experts_is_refused_with_what_would_work() -> None:
    """peft adapts experts that are stored as one tensor, but not with dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 2, "num_hidden_layers": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=VOCABULARY, num_attention_heads=4, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ModelError, match="peft cannot put this adapter on MixtralForCausalLM") as refused:
            adapter.add_lora(model, Lora(r=4))
        assert refused.value.where == "adapter.dropout" and "adapter.dropout: 0" in refused.value.fix
        adapter.add_lora(AutoModelForCausalLM.from_config(config), Lora(r=4, dropout=0.0))
