"""`raydist import`: an axolotl config about raw text becomes a job that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydist.imports import trainer
from tests.unit.imports.parts import imported

LORA = """\
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false

datasets:
  - path: data/notes.jsonl
    ds_type: json
    type: completion
    field: abstract
  - path: data/books
    type: completion
    shards: 4
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out

adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
tokens: ["<gene>", "<cell>"]
embedding_lr: 1.0e-5

sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true

wandb_project: notes
wandb_entity:

gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4

bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true

warmup_steps: 100
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.1
special_tokens:
  pad_token: <|end_of_text|>
hub_token: abcdefgh
"""

PRETRAIN = """\
base_model: gpt2
max_steps: 200
pretraining_dataset:
  - path: json
    data_files: [data/a.jsonl, data/b.jsonl]
    text_column: body
    type: pretrain
learning_rate: 0.0002
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
warmup_steps: 20
optimizer: adamw_bnb_8bit
micro_batch_size: 2
gradient_accumulation_steps: 8
fp16: true
deepspeed: deepspeed_configs/zero2.json
max_grad_norm: 0
save_steps: 50
seed: 7
torch_compile: true
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the text that the configs name, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "gpus", lambda: 0)
    Path("data/books").mkdir(parents=True)
    Path("data/notes.jsonl").write_text('{"abstract": "text"}\n')
    for name in ("a", "b"):
        Path(f"data/{name}.jsonl").write_text('{"body": "text"}\n')


def test_an_adapter_on_completion_data() -> None:
    job, comments = imported(LORA)
    assert (job.name, job.storage, job.model.base) == (
        "qlora-out", "./outputs/qlora-out", "NousResearch/Llama-3.2-1B"
    )  # fmt: skip
    sources = job.corpus.sources
    assert (sources["notes"].path, sources["notes"].text_column) == ("data/notes.jsonl", "abstract")
    assert (sources["books"].path, sources["books"].text_column) == ("data/books", "text")
    assert (job.corpus.holdout, job.packing.block_size, job.seed) == (0.05, 4096, 42)
    train = job.train
    assert (train.epochs, train.lr, train.scheduler, train.weight_decay) == (3, 2e-4, "cosine", 0.1)
    assert (train.global_batch_size, train.micro_batch_size, job.scaling.num_workers) == (8, 2, 1)
    assert (train.mixed_precision, train.gradient_checkpointing) == ("bf16", True)
    assert train.optimizer.name == "adamw"
    assert job.adapter is not None and job.quantization == "int4"
    assert (job.adapter.r, job.adapter.alpha, job.adapter.dropout) == (32, 16, 0.05)
    assert job.adapter.target_modules == "all-linear"
    assert job.adapter.modules_to_save == ["embed_tokens", "lm_head"]
    assert (job.model.add_tokens, job.train.embedding_learning_rate) == (["<gene>", "<cell>"], 1e-5)
    assert (job.checkpoint.save_steps, job.tracking.wandb) == ("epoch", "notes")
    assert comments == {
        'model_type: "LlamaForCausalLM"': comments['tokenizer_type: "AutoTokenizer"'],
        'tokenizer_type: "AutoTokenizer"': "transformers chooses classes by the base's own config; for random"
        " weights see model.config",
        "datasets[1].shards: 4": "a source of a job has no such key",
        'dataset_prepared_path: "last_run_prepared"': "its name in a job is storage (token logs are kept in"
        " it and made on all CPUs of the cluster)",
        "scaling.num_workers": "1: the config does not say on how many GPUs it runs, and this machine has"
        " none; with another number, train.global_batch_size changes in proportion",
        "tf32: false": comments["tf32: false"],
        "flash_attention: true": comments["flash_attention: true"],
        "warmup_steps: 100": "train.warmup_ratio is a share of the steps; raydist plan says how many steps"
        " there are",
        "evals_per_epoch: 4": "eval.eval_steps is a number of steps, or epoch",
        'special_tokens: {"pad_token": "<|end_of_text|>"}': "the tokenizer is used as it is; model.tokenizer"
        " names another",
        "hub_token: (not copied)": "a run uploads nothing: the trained model is in <storage>/<name>/model",
    }
    assert "abcdefgh" not in Path("job.yaml").read_text()


def test_pre_training_by_steps_under_zero() -> None:
    job, comments = imported(PRETRAIN)
    (source,) = job.corpus.sources.values()
    assert (source.path, source.text_column) == (["data/a.jsonl", "data/b.jsonl"], "body")
    train = job.train
    assert (train.max_steps, train.epochs, train.warmup_ratio, train.min_lr_ratio) == (200, None, 0.1, 0.1)
    assert (train.mixed_precision, train.max_grad_norm) == ("fp16", None)
    assert (train.global_batch_size, job.packing.block_size, job.seed) == (16, 512, 7)
    assert (job.strategy.name, job.strategy.stage, job.strategy.offload) == ("zero", 2, "none")
    assert (job.corpus.holdout, job.checkpoint.save_steps, job.adapter) == (0.0, 50, None)
    assert train.optimizer.name == "adamw"
    assert "adamw_8bit does not work under strategy zero" in comments['optimizer: "adamw_bnb_8bit"']
    assert train.compile == "auto"
    assert "layers are not compiled under strategy zero" in comments["torch_compile: true"]
    _, comments = imported(PRETRAIN + "reinit_weights: true\n")
    assert comments["reinit_weights: true"].startswith("its name in a job is model.config")


def test_the_batch_of_a_step_counts_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "gpus", lambda: 4)
    job, comments = imported(LORA)
    assert (job.scaling.num_workers, job.train.global_batch_size) == (4, 32)
    assert comments["scaling.num_workers"].startswith("4: ")


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lr_scheduler: constant_with_warmup", "train.scheduler", "constant"),
        ("lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 40}",
         "train.decay_ratio", 0.2),
        ("lr_scheduler: rex", "train.scheduler", "cosine"),
        ("bf16: false\nfp16: false", "train.mixed_precision", "fp32"),
        ("bf16: auto\nfp16: true", "train.mixed_precision", "bf16"),
        ("fsdp: [full_shard]\nfsdp_config: {fsdp_version: 2}\ndeepspeed:", "strategy.name", "fsdp"),
        ("deepspeed: zero3.json", "strategy.stage", 3),
        ("deepspeed: mine.json", "strategy.stage", 1),
        ("deepspeed: mine.json", "strategy.offload", "cpu"),
        ("batch_size: 64", "train.global_batch_size", 64),
        ("auto_find_batch_size: true", "train.micro_batch_size", "auto"),
        ("learning_rate: '2e-4'", "train.lr", 2e-4),
        ("warmup_ratio: 0.2\nwarmup_steps:", "train.warmup_ratio", 0.2),
        ("warmup_steps: 0", "train.warmup_ratio", 0.0),
        ("max_steps:\nnum_epochs: 1.5", "train.epochs", 2),
        ("adam_beta2: 0.95\noptimizer: muon\ndeepspeed:", "train.optimizer.betas", (0.9, 0.95)),
        ("sdp_attention: true", "model.attn_implementation", "sdpa"),
        ("dataset_exact_deduplication: true", "corpus.dedup", "exact"),
        ("use_tensorboard: true", "tracking.tensorboard", True),
        ("logging_steps: 0.1", "train.logging_steps", 10),
        ("logging_steps: [1, 2]", "train.logging_steps", 10),
        ("max_steps:\nnum_epochs: .inf", "train.epochs", 1),
    ],
)  # fmt: skip
def test_values_are_converted(line: str, key: str, value: object) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    Path("mine.json").write_text(json.dumps({"zero_optimization": zero}))
    names = {written.partition(":")[0] for written in line.splitlines()}
    kept = [each for each in PRETRAIN.splitlines() if each.partition(":")[0] not in names]
    job, _ = imported("\n".join([*kept, line]) + "\n")
    found: object = job
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_data_that_is_not_here_is_copied_with_a_comment() -> None:
    job, comments = imported(PRETRAIN.replace("data/a.jsonl", "gone/a.jsonl"))
    assert job.corpus.sources["a"].path == ["gone/a.jsonl", "data/b.jsonl"]
    assert 'pretraining_dataset[0].path: ["gone/a.jsonl"]' in comments


def test_a_split_of_a_folder_is_its_files() -> None:
    for split in ("train", "test"):
        Path(f"data/books/{split}.jsonl").write_text('{"text": "text"}\n')
    asked = "  - path: data/books\n    type: completion\n"
    job, _ = imported(LORA.replace(asked, f"{asked}    split: test\n"))
    assert job.corpus.sources["books"].path == "data/books/test.jsonl"
    job, _ = imported(LORA)
    assert (job.corpus.sources["books"].path, job.corpus.sources["books"].split) == ("data/books", "train")
    _, comments = imported(LORA.replace(asked, f"{asked}    split: gone\n"))
    assert any("nothing is named gone" in comment for comment in comments.values())
