"""A base, its tokenizer and an adapter are data: nothing in them runs, or takes all of the machine."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from raydist.corpus.tokenizer import pretrained_tokenizer
from raydist.errors import JobError, ModelError
from raydist.job.schema import Job
from raydist.model.base import check_stored, load_base
from raydist.model.build import load_config, model_sizes
from raydist.model.export import load_trained
from raydist.model.trust import QUANTIZED, read_adapter_config
from tests.train_parts import LLAMA, VOCABULARY, make_job, write_tokenizer

RAYDIST = Path(__file__).resolve().parents[3] / "raydist"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoConfig.for_model(**LLAMA, vocab_size=VOCABULARY)
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.fixture
def base(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that a test may spoil. Whoever asks on the terminal is told yes, and the test fails."""

    def asked(prompt: str = "") -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    return Path(shutil.copytree(whole, tmp_path / "base"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def job_of(base: Path) -> Job:
    return make_job(base.parent, model={"base": str(base), "config": None, "tokenizer": None})


def test_a_tokenizers_code_is_not_run_whatever_stdin_says(base: Path) -> None:
    (base / "code.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nclass Tokenizer: pass")
    auto_map = {"AutoTokenizer": [None, "code.Tokenizer"]}
    edit(base / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="X")
    for model_type in ("llama", "unheard-of"):
        edit(base / "config.json", model_type=model_type)
        with pytest.raises(ModelError, match="custom code"):
            pretrained_tokenizer(str(base))
    assert not (base / "ran").exists() and not (base.parent / "asked").exists()


def test_every_call_that_takes_it_says_that_no_code_is_trusted() -> None:
    """PeftConfig reads JSON alone; a call with None loads nothing."""
    bare = []
    for path in RAYDIST.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).rpartition(".")[2] in ("from_pretrained", "from_config"):
                text = ast.unparse(call)
                safe = any(word in text for word in ("trust_remote_code", "**NO_CODE", "**options"))
                if not safe and not text.startswith("PeftConfig."):
                    bare.append(f"{path.name}: {text}")
    assert not bare


def test_a_configuration_chooses_no_kernel(base: Path) -> None:
    chosen = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel@main:f"}
    edit(
        base / "config.json", **chosen, _experts_implementation="sonicmoe", experts_implementation="deepgemm"
    )
    job = job_of(base)
    config = load_config(job)
    assert (config._attn_implementation, config._experts_implementation) == (None, None)
    assert model_sizes(config, job).total > 0
    assert load_trained(base).config._attn_implementation == "sdpa"


def test_a_quantization_method_that_imports_code_is_refused(base: Path) -> None:
    job, own = job_of(base), {*QUANTIZED, "bitsandbytes_4bit", "bitsandbytes_8bit"}
    whole = (base / "config.json").read_text()
    for method in {*AUTO_QUANTIZATION_CONFIG_MAPPING, "unheard-of"} - own:
        stored = {"quant_method": method}
        for nested in ({"quantization_config": stored}, {"text_config": {"compression_config": stored}}):
            (base / "config.json").write_text(whole)
            edit(base / "config.json", **nested)
            with pytest.raises(ModelError, match=f"quantization method {method}"):
                load_config(job)
    for method in ("mxfp4", "fp8"):  # by transformers' own code, and not by a kernel from the hub
        edit(base / "config.json", quantization_config={"quant_method": method}, text_config={})
        assert load_config(job).quantization_config["dequantize"] is True


def a_pickle(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")


def an_index(name: str) -> Callable[[Path], None]:
    def spoil(base: Path) -> None:
        (base / "model.safetensors").unlink()
        torch.save({}, base / "x.bin")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    return spoil


def named(name: str) -> Callable[[Path], None]:
    def spoil(base: Path) -> None:
        an_index("x.bin")(base)
        shutil.copy(base / "model.safetensors.index.json", base / "my.safetensors.index.json")
        edit(base / "config.json", transformers_weights=name)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (a_pickle, r"(?s)no model\.safetensors.*pytorch_model\.bin.*pickles"),
        (an_index("x.bin"), r"names x\.bin"),
        (an_index("../other/model.safetensors"), r"names \.\./other"),
        (named("x.bin"), r"names x\.bin"),
        (named("adapter_model.bin"), r"names adapter_model\.bin"),
        (named("my.safetensors.index.json"), r"names x\.bin"),
    ],
)
def test_no_pickle_is_opened(base: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(base)
    for load in (check_stored, load_base, load_trained):
        with pytest.raises(ModelError, match=said):
            load(base if load is load_trained else str(base))  # type: ignore[operator]


def test_an_adapter_is_plain_lora_in_safetensors(base: Path) -> None:
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "r": 4}
    (base / "adapter_config.json").write_text(json.dumps(lora))
    with pytest.raises(ModelError, match="holds an adapter"):
        load_config(job_of(base))
    torch.save({}, base / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"(?s)no adapter_model\.safetensors.*adapter_model\.bin.*pickles"):
        read_adapter_config(base)
    save_file({}, base / "adapter_model.safetensors")
    assert read_adapter_config(base).base_model_name_or_path == str(base)
    for other in (
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    ):
        (base / "adapter_config.json").write_text(json.dumps({**lora, **other}))
        with pytest.raises(ModelError, match="not a plain LoRA adapter"):
            read_adapter_config(base)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e400},
        {"hidden_size": 10**12},
        {"intermediate_size": 2**40},
        {"vocab_size": 10**4000},
        {"max_position_embeddings": 10**18},
        {"num_attention_heads": 10**9},
        {"num_hidden_layers": 9999, "num_local_experts": 9999},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_sizes_that_fit_no_machine_are_refused_by_arithmetic(base: Path, sizes: dict[str, Any]) -> None:
    kind = {"model_type": "mixtral"} if len(sizes) > 1 else {}
    edit(base / "config.json", **kind, **sizes)
    with pytest.raises(ModelError, match=r"the most that is allowed|modules"):
        load_config(job_of(base))
    asked = {**LLAMA, **kind, **sizes}
    with pytest.raises(JobError, match=r"the most that is allowed|modules"):
        load_config(make_job(base.parent, model={"config": asked}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_file_without_end_or_bottom_is_refused(base: Path, name: str) -> None:
    def read() -> None:
        pretrained_tokenizer(str(base)) if name.startswith("tokenizer") else load_config(job_of(base))

    texts = ["[" * 100_000, '{"a":' * 100_000, "[]", "7", "null", '"x"', ""]
    for text in texts:
        (base / name).write_text(text)
        with pytest.raises(ModelError):
            read()
    (base / name).unlink()
    (base / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is not a file"):
        read()
    (base / name).unlink()
    with (base / name).open("wb") as hole:
        hole.truncate(2**31)
    with pytest.raises(ModelError, match="the most that is read"):
        read()
