"""Models in and out: random, from a base, with an adapter; and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import JobError, ModelError
from raydist.model.build import (
    build_model,
    check_fits,
    load_config,
    model_sizes,
    n_parameters,
)
from raydist.model.export import continue_text, load_trained, merge_adapter
from raydist.training.loop import train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    losses,
    make_job,
    make_spec,
    stopped_and_resumed,
    write_tokenizer,
)
from tests.weights import weight_hash

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained model in bf16."""
    config = AutoConfig.for_model(
        "llama", **{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=VOCABULARY
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # at their initial scale frozen weights leave an adapter little to say
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    return write_tokenizer(tmp_path / "base")


def from_base(base: Path) -> dict[str, Any]:
    return {"base": str(base), "config": None, "tokenizer": None}


def test_random_weights_are_the_seeds_and_fit_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "words")
    torch.manual_seed(123)  # what the process drew before does not matter
    one, two = (build_model(make_job(tmp_path), tokenizer, CPU).state_dict() for _ in range(2))
    other = build_model(make_job(tmp_path, seed=8), tokenizer, CPU)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other.state_dict()["lm_head.weight"])
    assert one["lm_head.weight"].shape[0] == VOCABULARY
    assert (other.config.eos_token_id, other.config.bos_token_id) == (0, None)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}


def test_a_base_is_trained_in_fp32_and_saved_in_its_own_dtype(tmp_path: Path, base: Path) -> None:
    spec = make_spec(tmp_path, model=from_base(base), train={"max_steps": 3})
    assert {p.dtype for p in build_model(spec.job, spec.tokenizer, CPU).parameters()} == {torch.float32}
    train(spec)
    stored = load_file(spec.run / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((spec.run / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert "raydist" not in json.dumps(config)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(spec.run / "model").state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    card = (spec.run / "model" / "README.md").read_text()
    assert f"base_model: {base}" in card
    assert "3 steps" in card


def test_an_export_keeps_what_a_user_put_into_the_folder(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 1})
    model = spec.run / "model"
    users = {"notes.txt": "mine", "quantized/weights.gguf": "mine"}
    for name, text in {**users, "model-00007-of-00009.safetensors": "of an earlier export"}.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    train(spec)
    assert {name: (model / name).read_text() for name in users} == users
    assert [path.name for path in model.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(model.parent.glob(".model*"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of transformers
def test_lora_trains_the_adapter_alone_loads_in_peft_and_merges(tmp_path: Path, base: Path) -> None:
    options = {"model": from_base(base), "adapter": {"r": 4, "dropout": 0.0}}
    spec = make_spec(tmp_path, **options, train={"lr": 3e-2})
    model = build_model(spec.job, spec.tokenizer, CPU)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}

    train(spec)
    found = losses(spec.run)
    assert found[20] < found[1] - 0.1
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(spec.run / "model", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 23, 40]])
    logits = adapted(ids).logits
    with adapted.disable_adapter():
        assert (adapted(ids).logits - logits).abs().max() > 1e-2
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(spec.run))
    assert merged.dtype == torch.bfloat16
    assert (merged(ids).logits - logits).abs().max() < 2e-2 * logits.abs().max()


def test_lora_resumes_bit_identical(tmp_path: Path, base: Path) -> None:
    options = {"model": from_base(base), "adapter": {"r": 4, "dropout": 0.1}, "train": {"max_steps": 10}}
    whole, cut = stopped_and_resumed(tmp_path, after=7, **options)
    assert weight_hash(cut / "model") == weight_hash(whole / "model")


def test_target_modules_that_do_not_exist_are_told_with_those_that_do(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path, model=from_base(base), adapter={"target_modules": ["q_proj", "query"]})
    with pytest.raises(ModelError, match=r"(?s)query.*choose from .*gate_proj.*q_proj"):
        build_model(job, base, CPU)


def test_a_base_that_cannot_be_found_is_told_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"(?s)empty cannot be used.*why:"):
        load_config(make_job(tmp_path, model=from_base(tmp_path / "empty")))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load_config(make_job(tmp_path, model=from_base(tmp_path / "foreign")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA, "hiden_size": 8}, "did you mean hidden_size"),
        ({"model_type": "lama"}, "did you mean .*llama"),
    ],
)
def test_a_misspelt_configuration_is_told(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        load_config(make_job(tmp_path, model={"config": config}))


def test_sizes_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "words")
    job = make_job(tmp_path, model={"config": {**LLAMA, "num_attention_heads": 5}})
    with pytest.raises(JobError, match=r"(?s)model\.config.*not a multiple"):
        build_model(job, tokenizer, CPU)


def test_blocks_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, packing={"block_size": 65})
    with pytest.raises(JobError, match=r"(?s)65 is above the model's 64.*packing\.block_size"):
        check_fits(load_config(job), job)


def test_an_adapter_needs_a_base(tmp_path: Path) -> None:
    job = make_job(tmp_path, adapter={"r": 4})
    with pytest.raises(JobError, match="adapter"):
        check_fits(load_config(job), job)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(tmp_path: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    bigger = AutoTokenizer.from_pretrained(base)
    bigger.add_tokens(["new"])
    bigger.save_pretrained(tmp_path / "bigger")
    with pytest.raises(ModelError, match="65 tokens and the model embeds 64"):
        build_model(make_job(tmp_path, model=from_base(base)), tmp_path / "bigger", CPU)


def test_sizes_are_counted_without_making_the_model(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path)
    built = build_model(job, base, CPU)
    sizes = model_sizes(load_config(job, VOCABULARY), job)
    assert (sizes.total, sizes.trainable, sizes.vocabulary) == (
        n_parameters(built),
        n_parameters(built),
        VOCABULARY,
    )
    lora = make_job(tmp_path, model=from_base(base), adapter={"r": 4})
    assert 0 < model_sizes(load_config(lora), lora).trainable < sizes.total / 4


def test_the_hash_is_of_names_and_bytes_and_text_goes_on(tmp_path: Path) -> None:
    one, two = (
        make_spec(tmp_path, run=run, train={"max_steps": 2}, seed=seed)
        for run, seed in (("one", 7), ("two", 8))
    )
    train(one)
    train(two)
    assert weight_hash(one.run / "model") != weight_hash(two.run / "model")
    prompt, continuation = continue_text(one.run / "model", [5, 6, 7], 4)
    assert prompt == "w5 w6 w7"
    assert 1 <= len(continuation.split()) <= 4
    assert load_trained(one.run / "model").training is False
