"""Models in and out: random, from a base, with an adapter; and what cannot be used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import JobError, ModelError
from raydist.folder import RunFolder
from raydist.model import base as base_module
from raydist.model.build import (
    build_model,
    check_fits,
    load_config,
    model_sizes,
    n_parameters,
)
from raydist.model.export import continue_text, load_trained, merge_adapter, saved_dtype
from raydist.run.preflight import check_job
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
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(RunFolder(spec.run)))
    assert merged.dtype == torch.bfloat16
    assert (merged(ids).logits - logits).abs().max() < 2e-2 * logits.abs().max()


@pytest.mark.filterwarnings("ignore")  # peft advises against an adapted head
def test_an_adapted_head_that_was_tied_is_merged_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    adapter = {"r": 4, "dropout": 0.0, "target_modules": ["q_proj", "lm_head"]}
    spec = make_spec(tmp_path, model=from_base(base), adapter=adapter, train={"lr": 3e-2})
    train(spec)
    adapted = AutoPeftModelForCausalLM.from_pretrained(spec.run / "model", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 23, 40]])
    logits = adapted(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(RunFolder(spec.run)))
    assert not merged.config.tie_word_embeddings
    assert (merged(ids).logits - logits).abs().max() < 2e-2 * logits.abs().max()
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_merge_that_moves_the_logits_writes_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    spec = make_spec(tmp_path, model=from_base(base), adapter={"r": 4, "dropout": 0.0}, train={"lr": 3e-2})
    train(spec)
    merge = LoraModel.merge_and_unload

    def wrong(self: Any) -> Any:
        merged = merge(self)
        merged.get_output_embeddings().weight.data.mul_(1.5)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(ModelError, match="the merged model is not the trained one"):
        merge_adapter(RunFolder(spec.run))
    assert not RunFolder(spec.run).merged.exists()


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


def test_a_tokenizer_that_is_not_the_bases_is_refused(tmp_path: Path, base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {**vocabulary, "w7": vocabulary["w9"], "w9": vocabulary["w7"]}
    shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    job = make_job(tmp_path, model={**from_base(base), "tokenizer": str(tmp_path / "other")})
    with pytest.raises(JobError, match="2 of the base's 64 tokens are others") as refused:
        check_job(job)
    assert "the model knows" in refused.value.why
    check_job(make_job(tmp_path, model={**from_base(base), "tokenizer": str(base)}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    check_job(job)  # a base without a tokenizer takes any


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_named_before_anything_is_spent(
    dtype: torch.dtype, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, name = make_job(tmp_path, model=from_base(base)), "model.layers.0.mlp.up_proj.weight"
    whole = {name: weight.to(dtype) for name, weight in load_file(base / "model.safetensors").items()}
    largest = torch.finfo(dtype).max
    for value, place, parts in (
        (largest, (3, 5), False),
        (float("nan"), (3, 5), False),
        (float("-inf"), (3, 5), False),
        (float("nan"), (-1, -1), True),
    ):
        weights = {**whole, name: whole[name].clone()}
        weights[name][place] = value
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        monkeypatch.setattr(base_module, "READ_WHOLE", 0 if parts else 2**30)
        if value == largest:
            check_job(job)
            continue
        for check in (check_job, lambda job: build_model(job, base, CPU)):
            with pytest.raises(ModelError, match="are not numbers") as refused:
                check(job)
            assert f"1 tensor with NaN or infinite values: {name}" in refused.value.why


def test_a_base_that_names_no_dtype_is_written_in_that_of_its_weights(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    weights = load_file(base / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        stored = {name: w.to(dtype) for name, w in weights.items()}
        save_file(stored, base / "model.safetensors", {"format": "pt"})
        assert saved_dtype(make_job(tmp_path, model=from_base(base))) == dtype


def test_a_base_that_was_cut_is_told_for_what_it_is(tmp_path: Path, base: Path) -> None:
    weights = base / "model.safetensors"
    for length in (weights.stat().st_size - 100, 1000, 4, 0):
        weights.write_bytes(weights.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors of .* is cut or damaged"):
            check_job(make_job(tmp_path, model=from_base(base)))


def test_a_pointer_of_git_lfs_is_told_for_what_it_is(tmp_path: Path, base: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"
    (base / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match=r"model\.safetensors of .* is a Git LFS pointer") as refused:
        check_job(make_job(tmp_path, model=from_base(base)))
    assert "git lfs pull" in refused.value.fix


def test_a_quantized_base_is_not_trained_as_it_is(tmp_path: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(JobError, match="is quantized already") as refused:
        check_job(make_job(tmp_path, model=from_base(base)))
    assert refused.value.where == "model.base"


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


# --- a base whose weights do not fit its configuration --------------------------------------------


def edited(base: Path, change: Any) -> Path:
    """Write what `change` makes of the stored tensors."""
    tensors = change(load_file(base / "model.safetensors"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def configured(base: Path, **changes: Any) -> Path:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    return base


def without(part: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def small(folder: Path, kind: str, **options: Any) -> Path:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return write_tokenizer(folder)


def gpt2(folder: Path) -> Path:
    return small(folder, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)


UNFIT = {
    "a missing layer": (
        lambda base: edited(base, without("layers.1.")),
        r"9 tensors missing: model\.layers\.1\.input_layernorm\.weight, .*, \.\.\.$",
    ),
    "fewer layers in the configuration": (
        lambda base: configured(base, num_hidden_layers=1),
        r"9 tensors unexpected: model\.layers\.1\.input_layernorm\.weight",
    ),
    "another prefix": (
        lambda base: edited(base, lambda of: {f"net.{name}": tensor for name, tensor in of.items()}),
        r"21 tensors missing: .*; 21 tensors unexpected: net\.",
    ),
    "more rows in the configuration": (
        lambda base: configured(base, vocab_size=VOCABULARY + 8),
        r"2 tensors of another shape: lm_head\.weight \(64x32, not 72x32\), model\.embed",
    ),
    "another width of a linear layer": (
        lambda base: configured(base, intermediate_size=40),
        r"6 tensors of another shape: .*down_proj\.weight \(32x48, not 32x40\)",
    ),
    "an untied head that is not stored": (
        lambda base: edited(base, without("lm_head")),
        r"1 tensor missing: lm_head\.weight",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_base_whose_weights_do_not_fit_is_refused_by_the_tensors_names(
    tmp_path: Path, base: Path, case: str
) -> None:
    spoil, said = UNFIT[case]
    job = make_job(tmp_path, model=from_base(spoil(base)))
    check = re.compile(rf"(?ms)do not fit its config\.json.*model\.base.*{said}")
    with pytest.raises(ModelError, match=check):
        check_job(job)
    with pytest.raises(ModelError, match=check):
        build_model(job, base, CPU)
    with pytest.raises(ModelError, match=rf"(?m){said}"):
        load_trained(base)  # a run's own model/ is such a folder


def test_a_base_is_checked_before_loading_without_reading_its_weights(tmp_path: Path) -> None:
    """128 GiB of them, all but the header a hole in the file."""
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": 2**30})
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    config.save_pretrained(tmp_path / "vast")
    with (tmp_path / "vast" / "model.safetensors").open("wb") as stored:
        text = json.dumps(header).encode()
        stored.write(len(text).to_bytes(8, "little") + text)
        stored.truncate(stored.tell() + end)
    check_job(make_job(tmp_path, model=from_base(tmp_path / "vast")))


def test_what_transformers_makes_again_or_ties_is_no_misfit(tmp_path: Path) -> None:
    tied = gpt2(tmp_path / "gpt2")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    mask = torch.ones(1, 1, 64, 64)
    old = {f"transformer.h.{i}.attn.{name}": mask.clone() for i in (0, 1) for name in ("bias", "masked_bias")}
    edited(tied, lambda of: of | old)
    bare = gpt2(tmp_path / "bare")  # as GPT2Model writes it, without the head's model around it
    edited(bare, lambda of: {name.removeprefix("transformer."): tensor for name, tensor in of.items()})
    llama = {k: v for k, v in LLAMA.items() if k != "model_type"}
    rotary = edited(
        small(tmp_path / "rotary", "llama", **llama),
        lambda of: of | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)},
    )
    for folder in (tied, bare, rotary):
        job = make_job(tmp_path, model=from_base(folder))
        check_job(job)
        build_model(job, folder, CPU)


def test_experts_are_merged_and_those_that_are_missing_named(tmp_path: Path) -> None:
    llama = {k: v for k, v in LLAMA.items() if k != "model_type"}
    folder = small(tmp_path / "experts", "mixtral", num_local_experts=4, **llama)
    job = make_job(tmp_path, model=from_base(folder))
    check_job(job)
    build_model(job, folder, CPU)
    edited(folder, without("layers.0.block_sparse_moe.experts.1.w1"))
    for refused in (lambda: check_job(job), lambda: build_model(job, folder, CPU)):
        with pytest.raises(ModelError, match=r"1 tensor incomplete: model\.layers\.0\.mlp\.experts\.gate_up"):
            refused()


def test_shards_are_checked_together(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    folder = write_tokenizer(tmp_path / "shards")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    job = make_job(tmp_path, model=from_base(folder))
    check_job(job)
    build_model(job, folder, CPU)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"(?s)cannot be used.*00002-of"):
        check_job(job)


def test_a_folder_without_weights_is_refused_before_loading(tmp_path: Path, base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)cannot be used.*no model\.safetensors"):
        check_job(make_job(tmp_path, model=from_base(base)))


def test_a_base_that_is_not_in_the_hubs_cache_is_left_to_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    """The cache of the hub has its configuration alone."""
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copy(base / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job = make_job(tmp_path, model={"base": "some/base", "config": None, "tokenizer": None})
    check_job(job)
    shutil.copy(edited(base, without("layers.1.")) / "model.safetensors", snapshot)
    with pytest.raises(ModelError, match=r"weights of some/base.*(?s:.*)9 tensors missing"):
        check_job(job)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses an old name of transformers
def test_an_adapter_or_its_base_that_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    spec = make_spec(tmp_path, model=from_base(base), adapter={"r": 4}, train={"max_steps": 2})
    train(spec)
    folder = spec.run / "model"
    whole = load_file(folder / "adapter_model.safetensors")
    for spoilt, said in (
        (without("layers.1.self_attn.q_proj")(whole), r"2 tensors missing: .*layers\.1\.self_attn\.q_proj"),
        (whole | {"base_model.model.other.lora_A.weight": torch.ones(4, 4)}, r"1 tensor unexpected: .*other"),
    ):
        save_file(spoilt, folder / "adapter_model.safetensors")
        for refused in (lambda: load_trained(folder), lambda: merge_adapter(RunFolder(spec.run))):
            with pytest.raises(ModelError, match=rf"(?s)the adapter's tensors.*{said}"):
                refused()
    save_file(whole, folder / "adapter_model.safetensors")
    load_trained(folder)
    edited(base, without("layers.1."))
    for refused in (lambda: load_trained(folder), lambda: merge_adapter(RunFolder(spec.run))):
        with pytest.raises(ModelError, match=r"9 tensors missing"):
            refused()
