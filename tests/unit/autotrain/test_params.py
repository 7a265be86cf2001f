"""Every parameter of the table changes the job or is refused; all that is wrong is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from raydist.autotrain.params import NEVER, LLMTrainingParams, refusals, run_name
from raydist.autotrain.table import ALIASES, OTHERS, TABLE
from raydist.cli import group
from raydist.errors import JobError
from raydist.job.load import build_job
from tests.unit.autotrain.parts import GPT2, write_base

STEERING = {
    "trainer",
    "backend",
    "optimizer",
    "padding",
    "metric_for_best_model",
    "merge_adapter",
    "resume_from_checkpoint",
    "push_to_hub",
    "username",
    "token",
}
"""Parameters that are no key of a job: each has its test here, in test_project.py or in test_guide.py."""

OTHER_VALUES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # parameter: another value, what it needs, the job's keys then
    "text_column": ("abstract", {}, {"corpus.sources.train.text_column": "abstract"}),
    "epochs": (2, {}, {"train.epochs": 2}),
    "batch_size": (4, {}, {"train.micro_batch_size": 4, "train.global_batch_size": 16}),
    "gradient_accumulation": (32, {}, {"train.micro_batch_size": 8, "train.global_batch_size": 256}),
    "num_workers": (3, {}, {"scaling.num_workers": 3, "train.global_batch_size": 96}),
    "auto_find_batch_size": (True, {}, {"train.micro_batch_size": "auto", "train.global_batch_size": 32}),
    "lr": (1e-3, {}, {"train.lr": 1e-3}),
    "warmup_ratio": (0.05, {}, {"train.warmup_ratio": 0.05}),
    "scheduler": ("cosine", {}, {"train.scheduler": "cosine", "train.warmup_ratio": 0.1}),
    "weight_decay": (0.01, {}, {"train.weight_decay": 0.01}),
    "max_grad_norm": (0.5, {}, {"train.max_grad_norm": 0.5}),
    "block_size": (32, {}, {"packing.block_size": 32}),
    "max_seq_length": (48, {}, {"packing.block_size": 48}),
    "add_eos_token": (False, {}, {"packing.add_eos_token": False}),
    "peft": (True, {}, {"adapter.r": 16, "adapter.alpha": 32, "adapter.dropout": 0.05}),
    "lora_r": (8, {"peft": True}, {"adapter.r": 8}),
    "lora_alpha": (64, {"peft": True}, {"adapter.alpha": 64}),
    "lora_dropout": (0.1, {"peft": True}, {"adapter.dropout": 0.1}),
    "target_modules": ("c_attn, c_fc", {"peft": True}, {"adapter.target_modules": ["c_attn", "c_fc"]}),
    "quantization": ("int8", {"peft": True}, {"quantization": "int8"}),
    "mixed_precision": ("bf16", {}, {"train.mixed_precision": "bf16"}),
    "gradient_checkpointing": (True, {}, {"train.gradient_checkpointing": True}),
    "use_flash_attention_2": (
        True,
        {"mixed_precision": "bf16"},
        {"model.attn_implementation": "flash_attention_2"},
    ),
    "distributed_backend": ("deepspeed", {}, {"strategy.name": "zero", "strategy.stage": 3}),
    "seed": (7, {}, {"seed": 7}),
    "logging_steps": (1, {}, {"train.logging_steps": 1}),
    "eval_strategy": ("no", {}, {"corpus.holdout": 0, "eval.sources": {}}),
    "eval_steps": (100, {"eval_strategy": "steps"}, {"eval.eval_steps": 100}),
    "save_strategy": ("no", {}, {"checkpoint.save_steps": NEVER}),
    "save_steps": (50, {"save_strategy": "steps"}, {"checkpoint.save_steps": 50}),
    "save_total_limit": (3, {}, {"checkpoint.save_total_limit": 3}),
    "load_best_model_at_end": (True, {}, {"checkpoint.load_best_model_at_end": True}),
    "log": ("tensorboard", {}, {"tracking.tensorboard": True, "tracking.mlflow": False}),
}

DEFAULTS = {
    "seed": 42,
    "packing.block_size": 64,
    "packing.add_eos_token": True,
    "corpus.holdout": 0.005,
    "train.epochs": 3,
    "train.lr": 5e-5,
    "train.scheduler": "linear",
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.mixed_precision": "fp32",
    "train.micro_batch_size": 8,
    "train.global_batch_size": 32,
    "train.logging_steps": 10,
    "train.gradient_checkpointing": False,
    "scaling.num_workers": 1,
    "strategy.name": "ddp",
    "eval.eval_steps": "epoch",
    "eval.sources": {},
    "checkpoint.save_steps": "epoch",
    "checkpoint.save_total_limit": 1,
    "checkpoint.load_best_model_at_end": False,
    "adapter": None,
    "quantization": None,
    "tracking.mlflow": False,
    "tracking.tensorboard": False,
    "tracking.wandb": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "gpt2", GPT2)


@pytest.fixture(scope="module")
def needed(base: Path) -> dict[str, Any]:
    """What every job needs; 64 positions."""
    (base.parent / "corpus.txt").write_text("a\nb\n")
    corpus, project = str(base.parent / "corpus.txt"), str(base.parent / "my-lm-model")
    return {"model": str(base), "data_path": corpus, "project_name": project}


def at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


def job_of(given: dict[str, Any]) -> dict[str, Any]:
    return LLMTrainingParams(**given).job().model_dump()


def problems(given: dict[str, Any]) -> list[str]:
    """As they are told when it is run."""
    with pytest.raises(JobError) as told:
        LLMTrainingParams.unchecked(given).job()
    count, *lines = told.value.what.splitlines()
    assert count.split()[0] == str(len(lines))
    return [line.strip() for line in lines]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(group, list(arguments))


def flags(given: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in given.items()
        for word in ([f"--{name}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]


# --- what it becomes


def test_the_defaults_become_a_job(needed: dict[str, Any]) -> None:
    job = job_of(needed)
    assert {key: at(job, key) for key in DEFAULTS} == DEFAULTS
    assert (job["name"], job["storage"]) == ("my-lm-model", needed["project_name"])
    assert job["model"]["base"] == needed["model"]
    assert at(job, "corpus.sources.train.path") == needed["data_path"]


def test_every_parameter_is_tried() -> None:
    assert set(TABLE) == set(OTHER_VALUES) | STEERING | {
        *("model", "data_path", "project_name", "train_split", "valid_split")
    }
    assert {name for name, parameter in TABLE.items() if not parameter.key} == STEERING


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_each_parameter_changes_the_job_and_the_job_it_prints(name: str, needed: dict[str, Any]) -> None:
    value, needs, expected = OTHER_VALUES[name]
    given = {**needed, **needs, name: value}
    assert value != TABLE[name].default
    job, without = job_of(given), job_of({**needed, **needs})
    assert job != without
    assert {key: at(job, key) for key in expected} == expected
    key = TABLE[name].key
    assert job["adapter"] if key == "adapter" else key in dotted(job)
    if value is False:
        return
    printed = run("llm", *flags(given), "--print-job")
    assert printed.exit_code == 0, printed.output
    assert build_job(yaml.safe_load(printed.output)).model_dump() == job


def dotted(values: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= {prefix + key} | (dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return found


def test_values_that_come_with_another_key(needed: dict[str, Any]) -> None:
    constant = job_of({**needed, "scheduler": "constant"})["train"]
    assert (constant["scheduler"], constant["warmup_ratio"]) == ("constant", 0)
    warmed = job_of({**needed, "scheduler": "constant_with_warmup"})["train"]
    assert (warmed["scheduler"], warmed["warmup_ratio"]) == ("constant", 0.1)
    assert job_of({**needed, "max_grad_norm": 0})["train"]["max_grad_norm"] is None
    assert job_of({**needed, "eval_strategy": "steps"})["eval"]["eval_steps"] == 500
    assert job_of({**needed, "save_strategy": "steps"})["checkpoint"]["save_steps"] == 500
    for log in ("mlflow", "wandb"):
        assert job_of({**needed, "log": log})["tracking"][log] is True
    assert job_of({**needed, "distributed_backend": "fsdp"})["strategy"]["name"] == "fsdp"
    assert job_of({**needed, "distributed_backend": "ddp"})["strategy"]["name"] == "ddp"


def test_splits_become_sources_and_nothing_is_held_out_beside_them(
    needed: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("train.txt", "dev.txt", "test.txt"):
        (tmp_path / name).write_text("a\n")
    split = {**needed, "data_path": str(tmp_path), "text_column": "abstract"}
    job = job_of({**split, "valid_split": "dev"})
    assert at(job, "corpus.sources.train.path") == str(tmp_path / "train.txt")
    valid = at(job, "eval.sources.valid")
    assert (valid["path"], valid["text_column"]) == (str(tmp_path / "dev.txt"), "abstract")
    assert (job["corpus"]["holdout"], job["eval"]["eval_steps"]) == (0, "epoch")
    other = job_of({**split, "train_split": "test"})
    assert at(other, "corpus.sources.train.path") == str(tmp_path / "test.txt")
    both = job_of({**needed, "data_path": [needed["data_path"], str(tmp_path / "dev.txt")]})
    assert at(both, "corpus.sources.train.path") == [needed["data_path"], str(tmp_path / "dev.txt")]
    words = [word for path in at(both, "corpus.sources.train.path") for word in ("--data-path", path)]
    told = run("llm", *flags({n: v for n, v in needed.items() if n != "data_path"}), *words, "--print-job")
    assert build_job(yaml.safe_load(told.output)).model_dump() == both


def test_what_raydist_always_does_is_no_key_and_no_refusal(needed: dict[str, Any]) -> None:
    always = {"trainer": "default", "backend": "local", "padding": "right", "optimizer": "adamw_torch_fused"}
    best = {"load_best_model_at_end": True}
    assert job_of({**needed, **always}) == job_of(needed)
    assert job_of({**needed, **best, "metric_for_best_model": "eval_loss"}) == job_of({**needed, **best})


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_parameter(alias: str, needed: dict[str, Any]) -> None:
    assert job_of({**needed, alias: 16}) == job_of({**needed, ALIASES[alias]: 16})
    dashes = run("llm", *flags({**needed, alias: 16}), "--print-job").output
    assert dashes == run("llm", *flags({**needed, ALIASES[alias]: 16}), "--print-job").output
    with pytest.raises(JobError, match="which is given too"):
        LLMTrainingParams(**{alias: 16, ALIASES[alias]: 16})


@pytest.mark.parametrize("limit", [48, 64, 2048])
def test_block_size_is_the_lesser_of_positions_and_the_limit(limit: int, needed: dict[str, Any]) -> None:
    assert job_of({**needed, "max_seq_length": limit})["packing"]["block_size"] == min(64, limit)


@pytest.mark.parametrize("limit", [16, 64])
def test_a_positive_block_size_wins_over_the_limit(limit: int, needed: dict[str, Any]) -> None:
    sizes = {"block_size": 32, "max_seq_length": limit}
    assert job_of({**needed, **sizes})["packing"]["block_size"] == 32


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-lm-model", "my-lm-model"),
        ("runs/model_512", "model_512"),
        ("my model (v2)", "my-model-v2"),
        ("模型", "model"),
        ("-x", "x"),
        ("tokens", "tokens-run"),
        ("config.json", "config.json-run"),
        ("a" * 120, "a" * 90),
    ],
)
def test_a_run_is_called_as_the_project_is(folder: str, name: str, needed: dict[str, Any]) -> None:
    assert run_name(Path(folder)) == name
    job = job_of({**needed, "project_name": folder})
    assert (job["name"], job["storage"]) == (name, folder)


def test_the_project_here_is_called_as_this_folder_is(
    needed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert job_of({**needed, "project_name": "."})["name"] == run_name(tmp_path)


def test_parameters_can_be_set_later_as_the_guide_does(needed: dict[str, Any]) -> None:
    config = LLMTrainingParams(trainer="default", gradient_checkpointing=True)
    for name, value in needed.items():
        setattr(config, name, value)
    config.quantization, config.peft, config.lora_r, config.lr = "int8", True, 8, 1e-5
    assert (config.lr, config.epochs, config.model_max_length) == (1e-5, 3, 2048)
    job = config.job()
    assert job.adapter is not None and job.adapter.r == 8 and job.quantization == "int8"
    with pytest.raises(JobError, match="epochs: 'three' is not int"):
        config.epochs = "three"
    with pytest.raises(JobError, match="did you mean lora_alpha"):
        config.lora_alfa = 3
    with pytest.raises(AttributeError):
        _ = config.lora_alfa
    assert config.to_json()["token"] == "(redacted)"


# --- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"trainer": "sft"}, "trainer: sft is not supported: raydist trains on raw text"),
    "distillation": ({"trainer": "distillation"}, "trainer: distillation is not supported"),
    "backend": (
        {"backend": "spaces-a10g-large"},
        "backend: spaces-a10g-large is not supported: for a cluster",
    ),
    "fp8": ({"mixed_precision": "fp8"}, "mixed_precision: fp8 is not supported; known: bf16, fp16"),
    "optimizer": (
        {"optimizer": "adafactor"},
        "optimizer: adafactor is not supported; others are train.optimizer in the job: --print-job",
    ),
    "scheduler": (
        {"scheduler": "polynomial"},
        "scheduler: polynomial is not supported; known: linear, cosine",
    ),
    "padding": ({"padding": "left"}, "padding: left is not supported"),
    "backend of ranks": ({"distributed_backend": "horovod"}, "distributed_backend: horovod is not supported"),
    "log": ({"log": "comet"}, "log: comet is not supported; known: none, mlflow, tensorboard, wandb"),
    "metric": (
        {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
        "metric_for_best_model: accuracy is not supported: raydist compares evaluation losses",
    ),
    "metric alone": (
        {"metric_for_best_model": "eval_loss"},
        "metric_for_best_model: it has an effect only with load_best_model_at_end on, not off",
    ),
    "sizes": (
        {"block_size": [512, 1024]},
        "block_size: give one size; for several, one after another in one run",
    ),
    "size": ({"block_size": 0}, "block_size: 0 is neither -1 nor a number of tokens from 8"),
    "too long": ({"block_size": 65}, "packing.block_size: block_size 65 is above the model's 64 positions"),
    "lora_r": ({"lora_r": 8}, "lora_r: it has an effect only with peft on, not off"),
    "lora_alpha": ({"lora_alpha": 8}, "lora_alpha: it has an effect only with peft on, not off"),
    "lora_dropout": ({"lora_dropout": 0.1}, "lora_dropout: it has an effect only with peft on"),
    "no dropout": ({"lora_dropout": 0.0}, "lora_dropout: it has an effect only with peft on"),
    "no bucket": ({"project_name": "s3://b/p"}, "project_name: s3://b/p is a URI, and a project is a folder"),
    "target_modules": (
        {"target_modules": "all-linear"},
        "target_modules: it has an effect only with peft on",
    ),
    "merge_adapter": ({"merge_adapter": True}, "merge_adapter: it has an effect only with peft on"),
    "quantization": ({"quantization": "int4"}, "quantization: it has an effect only with peft on"),
    "flash": (
        {"use_flash_attention_2": True},
        "use_flash_attention_2: it has an effect only with mixed_precision bf16, not unset",
    ),
    "eval_steps": (
        {"eval_steps": 5},
        "eval_steps: it has an effect only with eval_strategy steps",
    ),
    "save_steps": (
        {"save_steps": 5},
        "save_steps: it has an effect only with save_strategy steps",
    ),
    "warmup": (
        {"scheduler": "constant", "warmup_ratio": 0.1},
        "warmup_ratio: scheduler constant has no warm-up; use constant_with_warmup",
    ),
    "best of none": (
        {"eval_strategy": "no", "load_best_model_at_end": True},
        "load_best_model_at_end: nothing is evaluated with eval_strategy no",
    ),
    "valid of none": (
        {"eval_strategy": "no", "valid_split": "validation"},
        "valid_split: nothing is evaluated with eval_strategy no",
    ),
    "username": ({"username": "me"}, "username: it has an effect only with push_to_hub on"),
    "token": ({"token": "HF_TOKEN"}, "token: it has an effect only with push_to_hub on"),
    "no username": ({"push_to_hub": True}, "push_to_hub: username is missing"),
    "type": ({"epochs": "three"}, "epochs: 'three' is not int"),
    "a number is no switch": ({"peft": 1}, "peft: 1 is not bool"),
    "a switch is no number": ({"epochs": True}, "epochs: True is not int"),
    "range": ({"lr": -1.0}, "lr: train.lr: Input should be greater than 0, not -1.0"),
    "unknown": ({"lora_rank": 8}, "lora_rank: no such parameter; did you mean lora_r?"),
    "no model": ({"model": "no/such-model"}, "model.base: the base model no/such-model cannot be used"),
    "inside": (
        {"data_path": ".", "project_name": "./out"},
        "project_name: out is inside ., where every file is training text",
    ),
    "no file": ({"data_path": "./gone.txt"}, "data_path: no file or folder ./gone.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_reason(case: str, needed: dict[str, Any]) -> None:
    wrong, reason = REFUSED[case]
    (told,) = problems({**needed, **wrong})
    assert told.startswith(reason)


OF_OTHERS = """
    chat_template apply_chat_template response_only_loss use_sharegpt_mapping model_ref dpo_beta
    max_prompt_length prompt_text_column rejected_text_column rl_gamma rl_reward_model_path use_distillation
    teacher_model distill_alpha use_sweep sweep_n_trials wandb_sweep_id unsloth use_vllm vllm_mode
    inference_prompts sample_top_k use_enhanced_eval eval_metrics eval_dataset_path custom_loss
    use_forward_backward manual_optimizer_control gradient_accumulation_steps max_samples packing
    disable_gradient_checkpointing attn_implementation save_processed_data repo_id ddp_timeout wandb_run_id
"""


@pytest.mark.parametrize("name", OF_OTHERS.split())
def test_a_parameter_of_another_trainer_or_feature_has_its_own_reason(name: str) -> None:
    (reason,) = refusals({name: "x"}).values()
    assert reason in OTHERS.values()
    told = run("llm", f"--{name.replace('_', '-')}", "x", "--train")
    assert isinstance(told.exception, JobError) and f"{name}: {reason}" in told.exception.what


def test_everything_that_is_wrong_is_told_at_once(needed: dict[str, Any]) -> None:
    arguments = [
        "--trainer",
        "sft",
        "--lora_r",
        "8",
        "--lr",
        "-1",
        "--batchsize=4",
        "--unsloth",
        "--rl-gamma",
        "1",
    ]
    told = run("llm", *arguments, "--model", needed["model"], "--data-path", needed["data_path"])
    assert isinstance(told.exception, JobError)
    named = [line.split(":")[0].strip() for line in told.exception.what.splitlines()[1:]]
    assert sorted(named) == sorted(["trainer", "lora_r", "batchsize", "unsloth", "rl_gamma", "project_name"])
    told = run("llm", *arguments, *flags(needed))
    assert isinstance(told.exception, JobError) and "lr: train.lr: Input" in told.exception.what


def test_no_workers_are_refused(needed: dict[str, Any]) -> None:
    assert any("scaling.num_workers" in told for told in problems({**needed, "num_workers": 0}))


def test_a_literal_token_is_refused_and_not_repeated(needed: dict[str, Any]) -> None:
    secret = "hf_" + "aBcD" * 8
    given = {**needed, "push_to_hub": True, "username": "me", "token": secret}
    told = run("llm", *flags(given))
    assert isinstance(told.exception, JobError) and "name an environment variable" in told.exception.what
    assert secret not in told.output + str(told.exception)


def test_a_cluster_that_takes_jobs_is_told_how(needed: dict[str, Any]) -> None:
    told = run("llm", *flags(needed), "--address", "http://head:8265")
    assert isinstance(told.exception, JobError) and "--print-job > job.yaml" in told.exception.fix


def test_help_lists_every_parameter() -> None:
    told = run("llm", "--help").output
    for name in [*TABLE, *ALIASES]:
        assert f"--{name.replace('_', '-')}" in told
