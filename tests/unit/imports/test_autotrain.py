"""`raydist import`: an AutoTrain config becomes a job file, with a comment for what has no counterpart."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raydist.cli import group
from raydist.errors import JobError
from raydist.job.load import load_job
from tests.unit.autotrain.parts import LLAMA, write_base

LITERAL = "hf_" + "aBcD" * 8
CONFIG = """\
task: llm
base_model: {base}
project_name: llama-medical
log: tensorboard
backend: local
data:
  path: {data}
  train_split: train
  valid_split: null
  chat_template: null
  column_mapping:
    text_column: abstract
params:
  trainer: default
  block_size: 64
  model_max_length: 32
  max_prompt_length: 512
  epochs: 2
  batch_size: 1
  lr: 2e-5
  peft: true
  quantization: int4
  target_modules: q_proj,k_proj
  padding: right
  optimizer: adamw_torch
  scheduler: cosine
  gradient_accumulation: 8
  mixed_precision: bf16
  merge_adapter: true
  lora_rank: 8
  chat_template: chatml
hub:
  username: ${{HF_USERNAME}}
  token: {token}
  push_to_hub: true
"""


@pytest.fixture
def config(tmp_path: Path) -> dict[str, str]:
    base = write_base(tmp_path / "base", LLAMA)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"abstract": "a"}\n')
    return {"base": str(base), "data": str(tmp_path / "data"), "token": "${HF_TOKEN}"}


def imported(folder: Path, text: str, *arguments: str) -> Result:
    (folder / "config.yml").write_text(text)
    return CliRunner().invoke(group, ["import", str(folder / "config.yml"), *arguments])


def test_what_the_table_maps_becomes_the_job(tmp_path: Path, config: dict[str, str]) -> None:
    told = imported(tmp_path, CONFIG.format(**config), "-o", str(tmp_path / "job.yaml"))
    assert told.exit_code == 0 and "raydist submit" in told.output
    job = load_job(tmp_path / "job.yaml")
    assert (job.name, job.storage, job.model.base) == ("llama-medical", "llama-medical", config["base"])
    (source,) = job.corpus.sources.values()
    assert (source.path, source.text_column) == (f"{config['data']}/train.jsonl", "abstract")
    train = job.train
    assert (train.epochs, train.lr, train.scheduler, train.mixed_precision) == (2, 2e-5, "cosine", "bf16")
    assert (train.global_batch_size, train.micro_batch_size) == (8, 1)
    assert job.adapter is not None and job.adapter.target_modules == ["q_proj", "k_proj"]
    assert (job.quantization, job.packing.block_size, job.tracking.tensorboard) == ("int4", 64, True)
    again = imported(tmp_path, CONFIG.format(**config), "-o", str(tmp_path / "job.yaml"))
    assert isinstance(again.exception, JobError) and "--force" in again.exception.fix


def test_each_key_without_a_counterpart_is_a_comment(tmp_path: Path, config: dict[str, str]) -> None:
    text = imported(tmp_path, CONFIG.format(**config)).output
    comments = [line for line in text.splitlines() if line.startswith("#")][1:]
    expected = {
        "data.chat_template: null": "raw text has no messages",
        'params.chat_template: "chatml"': "data.chat_template sets it already",
        "params.max_prompt_length: 512": "it belongs to the trainers of preferences",
        "params.lora_rank: 8": "no such parameter; did you mean lora_r?",
        "params.merge_adapter: true": "raydist export RUN --merge",
        'hub.username: "${HF_USERNAME}"': "a job has no such key, but raydist llm has the option",
        'hub.token: "${HF_TOKEN}"': "a job has no such key, but raydist llm has the option",
        "hub.push_to_hub: true": "a job has no such key, but raydist llm has the option",
    }
    for key, reason in expected.items():
        (line,) = [line for line in comments if line.startswith(f"# {key} ")]
        assert reason in line
    assert len(comments) == len(expected)


def test_a_literal_token_is_copied_nowhere(tmp_path: Path, config: dict[str, str]) -> None:
    config["token"] = LITERAL
    told = imported(tmp_path, CONFIG.format(**config))
    assert told.exit_code == 0 and "# hub.token: (not copied)" in told.output and LITERAL not in told.output
    config["token"] = "no-prefix-but-secret"
    assert "no-prefix" not in imported(tmp_path, CONFIG.format(**config)).output


def test_data_and_a_model_that_are_not_here_are_taken_as_they_are(tmp_path: Path) -> None:
    text = CONFIG.format(base="no/such-model", data="gone/corpus.jsonl", token="x")
    told = imported(tmp_path, text, "-o", str(tmp_path / "job.yaml"))
    assert told.exit_code == 0
    job = load_job(tmp_path / "job.yaml")
    assert job.model.base == "no/such-model" and job.corpus.sources["train"].path == "gone/corpus.jsonl"
    comments = (tmp_path / "job.yaml").read_text()
    assert "no file or folder gone/corpus.jsonl" in comments and "no/such-model cannot be used" in comments


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: llm-sft\nbase_model: gpt2\n", "a config for task llm-sft"),
        ("task: text-classification\n", "a config for task text-classification"),
        ("params: {trainer: default}\n", "a config for task None"),
        ("task: llm\nparams: {trainer: dpo}\n", "a config for task llm, trainer dpo"),
        ("task: llm\nbase_model: gpt2\n", "the config has no data.path, no project_name"),
        ("- a\n", "a job is a mapping of keys to values"),
        ("task: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_what_is_no_config_of_this_trainer_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    told = imported(tmp_path, text)
    assert isinstance(told.exception, JobError) and told.exception.what == reason
