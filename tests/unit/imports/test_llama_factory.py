"""`raydist import`: a LLaMA-Factory config of stage pt becomes a job that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from raydist.cli import group
from raydist.errors import JobError
from raydist.imports import trainer
from tests.unit.imports.parts import imported

CONFIG = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B
trust_remote_code: true
quantization_bit: 8

### method
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
additional_target: embed_tokens,lm_head
add_tokens: <gene>,<cell>
resize_vocab: true

### dataset
dataset: notes,books
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/pretrain
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: [tensorboard, wandb]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 250
"""

INFO = {
    "notes": {"file_name": "notes.jsonl", "columns": {"prompt": "text"}},
    "books": {"file_name": "books.csv", "columns": {"prompt": "body", "query": "more"}},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the text that the configs name, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "gpus", lambda: 0)
    Path("data").mkdir()
    Path("data/notes.jsonl").write_text('{"text": "a"}\n')
    Path("data/books.csv").write_text("body,more\na,b\n")
    Path("data/dataset_info.json").write_text(json.dumps(INFO))


def test_stage_pt_with_an_adapter() -> None:
    job, comments = imported(CONFIG)
    assert (job.name, job.storage) == ("pretrain", "saves/llama3-8b/lora/pretrain")
    sources = job.corpus.sources
    assert (sources["notes"].path, sources["notes"].text_column) == ("data/notes.jsonl", "text")
    assert (sources["books"].path, sources["books"].text_column) == ("data/books.csv", "body")
    assert (job.corpus.holdout, job.packing.block_size, job.seed) == (0.1, 1024, 42)
    train = job.train
    assert (train.epochs, train.lr, train.scheduler, train.warmup_ratio) == (3, 1e-4, "cosine", 0.1)
    assert (train.global_batch_size, train.micro_batch_size) == (8, 1)
    assert (train.mixed_precision, train.gradient_checkpointing) == ("bf16", True)
    assert job.adapter is not None and job.quantization == "int8"
    assert (job.adapter.r, job.adapter.alpha, job.adapter.dropout) == (8, 16, 0.0)
    assert job.adapter.target_modules == ["q_proj", "v_proj"]
    assert job.adapter.modules_to_save == ["embed_tokens", "lm_head"]
    assert job.model.add_tokens == ["<gene>", "<cell>"]
    assert (job.checkpoint.save_steps, job.eval.eval_steps) == (500, 250)
    assert (job.tracking.mlflow, job.tracking.tensorboard, job.tracking.wandb) == (False, True, True)
    assert list(comments) == [
        "scaling.num_workers", 'books.columns.query: "more"', "trust_remote_code: true", "max_samples: 1000",
        "overwrite_cache: true", "preprocessing_num_workers: 16", "plot_loss: true",
        "overwrite_output_dir: true", "ddp_timeout: 180000000", "per_device_eval_batch_size: 1",
    ]  # fmt: skip


def test_what_the_file_leaves_out_is_llama_factorys_default() -> None:
    job, _ = imported("model_name_or_path: gpt2\nstage: pt\nfinetuning_type: full\ndataset: notes\n")
    train = job.train
    assert (train.epochs, train.lr, train.scheduler, train.warmup_ratio) == (3, 5e-5, "linear", 0.0)
    assert (train.global_batch_size, train.mixed_precision, job.packing.block_size) == (8, "fp32", 2048)
    assert (job.corpus.holdout, job.adapter, job.seed) == (0.0, None, 42)


def test_a_mixture_needs_a_number_of_steps() -> None:
    mixed = CONFIG + "mix_strategy: interleave_under\ninterleave_probs: 0.25,0.75\n"
    _, comments = imported(mixed)
    assert "train.max_steps" in comments['interleave_probs: "0.25,0.75"']
    job, _ = imported(mixed + "max_steps: 100\nray_num_workers: 2\n")
    assert [source.weight for source in job.corpus.sources.values()] == [0.25, 0.75]
    assert (job.train.max_steps, job.scaling.num_workers, job.train.global_batch_size) == (100, 2, 16)


def test_without_dataset_info_the_source_is_to_be_corrected() -> None:
    Path("data/dataset_info.json").unlink()
    job, comments = imported(CONFIG)
    assert job.corpus.sources["notes"].path == "data/notes"
    assert comments['dataset notes: "data"'].startswith("there is no data/dataset_info.json here")


def test_conversations_are_not_raw_text() -> None:
    Path("config.yml").write_text(CONFIG.replace("notes,books", "chats"))
    error = CliRunner().invoke(group, ["import", "config.yml"]).exception
    assert isinstance(error, JobError) and "chats of a LLaMA-Factory config is not raw text" in error.what
