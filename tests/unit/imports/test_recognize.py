"""Whose config a file is shows in its keys; what does not train on raw text is refused by what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from raydist.cli import group
from raydist.errors import JobError
from raydist.imports.recognize import OTHERS

LLAMA_FACTORY = "model_name_or_path: a\ndataset: b\n"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.yml", "base_model: a\ndatasets: [{path: b, type: alpaca}]\n",
         "an axolotl config with data sets of type alpaca"),
        ("a.yml", "base_model: a\ndatasets: [{path: b, type: chat_template}, {path: c, type: completion}]\n",
         "an axolotl config with data sets of type chat_template"),
        ("a.yml", "base_model: a\ndatasets: [{path: b}]\n",
         "an axolotl config with data sets of type none, which axolotl takes as tokens"),
        ("a.yml", "base_model: a\nrl: dpo\n", "an axolotl config for preferences or rewards (rl: dpo)"),
        ("a.yml", "base_model: a\npretraining_dataset: b\ndiffusion: {eps: 5e-4}\n",
         "an axolotl config for another aim than the next token (diffusion)"),
        ("a.yml", "base_model: a\nadapter: llama-adapter\n", "an axolotl config for adapter: llama-adapter"),
        ("a.yml", "base_model: a\n", "an axolotl config without data"),
        ("a.yaml", LLAMA_FACTORY + "stage: sft\n", "a LLaMA-Factory config for stage sft"),
        ("a.yaml", LLAMA_FACTORY + "stage: kto\n", "a LLaMA-Factory config for stage kto"),
        ("a.yaml", LLAMA_FACTORY + "template: llama3\n", "a LLaMA-Factory config for stage sft, the default"),
        ("a.yaml", LLAMA_FACTORY + "stage: pt\nfinetuning_type: freeze\n",
         "a LLaMA-Factory config for finetuning_type: freeze"),
        ("a.yaml", "model_name_or_path: a\nstage: pt\n", "a LLaMA-Factory config without data"),
        ("a.yaml", "model_name_or_path: a\ndataset_name: b\n",
         "a.yaml is arguments of TRL or of Hugging Face's scripts"),
        ("a.toml", '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nseq_len = 8192\n',
         "a.toml is a torchtitan config"),
        ("a.yaml", "model: {_component_: torchtune.models.llama3.llama3_8b}\n",
         "a.yaml is a torchtune config"),
        ("a.json", '{"zero_optimization": {"stage": 3}}', "a.json is a DeepSpeed config"),
        ("a.yaml", "compute_environment: LOCAL_MACHINE\n", "a.yaml is an accelerate config"),
        ("a.yaml", "name: a\ncorpus: {sources: {a: {path: b}}}\n", "a.yaml is a raydist job"),
        ("a.yaml", "colour: red\n", "a.yaml is no config that raydist import knows"),
        ("a.toml", "= 1", "cannot read"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_it_is(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).write_text(text)
    error = CliRunner().invoke(group, ["import", str(tmp_path / name)]).exception
    assert isinstance(error, JobError) and error.exit_code == 2
    assert error.what.startswith(what) and (error.fix or error.why)


def test_each_kind_of_refused_file_says_why() -> None:
    assert all(keys and why for keys, why in OTHERS.values())
