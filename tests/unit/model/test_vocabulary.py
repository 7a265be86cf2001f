"""New tokens: rows in the embedding and the head, which are trained, saved, loaded by peft and merged."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raydist.corpus.tokenizer import with_tokens
from raydist.errors import ModelError
from raydist.folder import RunFolder
from raydist.model.build import build_model, load_config, model_sizes, n_parameters
from raydist.model.export import load_trained, merge_adapter
from raydist.model.vocabulary import grow_vocabulary
from raydist.storage import Storage
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from tests.train_parts import LLAMA, VOCABULARY, make_job, make_spec, write_tokenizer

CPU = torch.device("cpu")
NEW = ["new1", "new2"]
BOTH = ["embed_tokens", "lm_head"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def llama(*, tied: bool, rows: int = VOCABULARY) -> Any:
    options = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options, vocab_size=rows, tie_word_embeddings=tied)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config)


def spec_of(folder: Path, *, tied: bool, adapter: dict[str, Any] | None, **train: Any) -> AttemptSpec:
    """A run of a base with two new tokens."""
    base = folder / "base"
    llama(tied=tied).save_pretrained(base)
    write_tokenizer(base)
    tokenizer = with_tokens(str(base), NEW, Storage(folder))
    model = {"base": str(base), "config": None, "tokenizer": None, "add_tokens": NEW}
    more = {} if adapter is None else {"adapter": {"r": 4, "dropout": 0.0, **adapter}}
    spec = make_spec(folder, model=model, train={"max_steps": 5, **train}, **more)
    return replace(spec, tokenizer=Path(tokenizer.folder))


@TIED
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(tied: bool) -> None:
    model, old = llama(tied=tied), llama(tied=tied)
    grow_vocabulary(model, 70)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        now, before = getattr(model, get)().weight, getattr(old, get)().weight
        assert torch.equal(now[:VOCABULARY], before)
        torch.testing.assert_close(now[VOCABULARY:], before.mean(0).expand(6, -1))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == 70 and model(input_ids=torch.tensor([[69]])).logits.shape[-1] == 70
    with torch.device("meta"):  # as the ranks have it that get their shards from the first
        there = llama(tied=tied)
        grow_vocabulary(there, 70)
    assert [p.shape for p in there.parameters()] == [p.shape for p in model.parameters()]


def test_rows_that_a_base_has_to_spare_are_taken_as_they_are() -> None:
    model, old = llama(tied=False, rows=128), llama(tied=False, rows=128)
    grow_vocabulary(model, 70)
    assert torch.equal(model.get_input_embeddings().weight, old.get_input_embeddings().weight)


def test_a_model_trained_whole_is_exported_with_its_new_tokens(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tied=True, adapter=None)
    train(spec)
    model = AutoModelForCausalLM.from_pretrained(spec.run / "model")
    tokenizer = AutoTokenizer.from_pretrained(spec.run / "model")
    assert model.config.vocab_size == len(tokenizer) == VOCABULARY + 2
    assert tokenizer.convert_tokens_to_ids(NEW) == [VOCABULARY, VOCABULARY + 1]


@TIED
def test_whole_modules_are_trained_next_to_lora_saved_as_peft_saves_them_and_merged(
    tied: bool, tmp_path: Path
) -> None:
    saved = BOTH[: 1 if tied else 2]
    spec = spec_of(tmp_path, tied=tied, adapter={"modules_to_save": saved}, embedding_learning_rate=5e-2)
    train(spec)
    ids = torch.arange(VOCABULARY + 2)[None, 26:]
    loaded = load_trained(spec.run / "model")
    trained = loaded(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with warnings.catch_warnings(action="ignore"):  # peft's, of a tied head in the file
        plain = PeftModel.from_pretrained(base, spec.run / "model").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, trained)
    of_base = llama(tied=tied).get_input_embeddings().weight
    moved = (loaded.get_input_embeddings().weight[:VOCABULARY] - of_base).abs().max()
    assert moved > 0.05  # five steps of up to 0.05
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(RunFolder(spec.run)))
    torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert len(AutoTokenizer.from_pretrained(spec.run / "export" / "merged")) == VOCABULARY + 2


@TIED
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_counts_the_model_that_is_trained(tied: bool, precision: str, tmp_path: Path) -> None:
    adapter = {"modules_to_save": BOTH[: 1 if tied else 2]}
    spec = spec_of(tmp_path, tied=tied, adapter=adapter, mixed_precision=precision)
    sizes = model_sizes(load_config(spec.job), spec.job, VOCABULARY + 2)
    model = build_model(spec.job, spec.tokenizer, CPU)
    assert sizes.vocabulary == VOCABULARY + 2
    assert (sizes.total, sizes.trainable) == (n_parameters(model), n_parameters(model, trainable=True))
    assert sizes.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("adapter", "said", "fix"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            "rows in lm_head would not be trained",
            "embed_tokens, lm_head",
        ),
        ({"modules_to_save": ["wte"]}, "no module named wte", "model.embed_tokens, lm_head"),
        ({"modules_to_save": ["down_proj"]}, "it gets an adapter as well", "leave down_proj out"),
    ],
)
def test_what_would_not_train_the_new_tokens_is_refused(
    adapter: dict[str, Any], said: str, fix: str, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, tied=False, adapter=adapter)
    with pytest.raises(ModelError, match=said) as refused:
        build_model(spec.job, spec.tokenizer, CPU)
    assert fix in refused.value.fix and refused.value.where == "adapter.modules_to_save"
    with pytest.raises(ModelError, match=said):
        model_sizes(load_config(spec.job), spec.job, VOCABULARY + 2)


def test_a_learning_rate_of_embeddings_needs_one_that_is_trained(tmp_path: Path) -> None:
    from raydist.parallel.optimizer import LR_SCALE, make_optimizer, set_learning_rate

    plain = make_job(tmp_path, train={"lr": 1e-2, "embedding_learning_rate": 1e-3})
    model = llama(tied=False)
    optimizer = make_optimizer(model, plain.train)
    set_learning_rate(optimizer, 5e-3)
    slow = [group for group in optimizer.param_groups if LR_SCALE in group]
    assert [group["lr"] for group in slow] == [pytest.approx(5e-4)]
    assert {*slow[0]["params"]} == {model.model.embed_tokens.weight, model.lm_head.weight}
    assert {group["lr"] for group in optimizer.param_groups if LR_SCALE not in group} == {5e-3}
    for module in (model.model.embed_tokens, model.lm_head):
        module.requires_grad_(False)
    with pytest.raises(ModelError, match="neither the embedding nor the head is trained"):
        make_optimizer(model, plain.train)
