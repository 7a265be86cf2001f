"""Every parameter of AutoTrain's default trainer and what it becomes in a job; and why others are refused.

The command line's options, the check of values, the mapping and the documentation are made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """key: the job key that it sets; "" if it controls the command, not the job.

    kinds: types of its values.  values: allowed value -> value in the job; None allows all.  refused: the
    message for any other value.  needs: (parameter, value) without which it has no effect; (name, True)
    means that the parameter is on.
    """

    kinds: tuple[type, ...]
    default: Any
    key: str
    meaning: str
    values: Mapping[Any, Any] | None = None
    refused: str = ""
    needs: tuple[str, Any] | None = None


TEXT, INT, REAL, FLAG = (str,), (int,), (float, int), (bool,)
WHEN = {"epoch": "epoch", "steps": "steps", "no": "no"}
LORA = ("peft", True)
HUB = ("push_to_hub", True)

TABLE: dict[str, Parameter] = {
    "model": Parameter(TEXT, None, "model.base", "hub id or folder of the model to start from; required"),
    "trainer": Parameter(
        TEXT, "default", "", "trains on raw text; others are refused", {"default": None, "generic": None},
        "is not supported: raydist trains on raw text, by the next token (TRL has the trainers of"
        " instructions and preferences)",
    ),
    "backend": Parameter(
        TEXT, "local", "", "where it runs: on this machine", {"local": None},
        "is not supported: for a cluster of your own, --print-job > job.yaml and"
        " raydist submit job.yaml --address URL",
    ),
    "data_path": Parameter(
        (str, list), None, "corpus.sources.train.path",
        "file, folder, list of them or hub data set (owner/name, owner/name:config); txt, json, jsonl,"
        " csv, parquet; required",
    ),
    "text_column": Parameter(TEXT, "text", "corpus.sources.train.text_column", "column that has the text"),
    "train_split": Parameter(
        TEXT, "train", "corpus.sources.train.path",
        "split of the folder's data set, or files or subfolders of this name, if any",
    ),
    "valid_split": Parameter(
        TEXT, None, "eval.sources.valid.path",
        "split of the folder or data set, or a path; without it 0.5% of the documents are held out",
    ),
    "project_name": Parameter(
        TEXT, None, "storage", "output folder P, which gets the model; the run is in P/<name of P>; required"
    ),
    "epochs": Parameter(INT, 3, "train.epochs", "passes over all documents"),
    "batch_size": Parameter(INT, 8, "train.micro_batch_size", "sequences per device and forward pass"),
    "gradient_accumulation": Parameter(
        INT, 4, "train.global_batch_size", "batches per optimizer step: x batch_size x num_workers sequences"
    ),
    "num_workers": Parameter(
        INT, None, "scaling.num_workers", "training processes; default: this machine's GPUs, else 1"
    ),
    "auto_find_batch_size": Parameter(
        FLAG, False, "train.micro_batch_size", "if memory runs out, halve the micro batch, not the step"
    ),
    "lr": Parameter(REAL, 5e-5, "train.lr", "peak learning rate"),
    "warmup_ratio": Parameter(REAL, 0.1, "train.warmup_ratio", "share of the steps in which lr rises"),
    "scheduler": Parameter(
        TEXT, "linear", "train.scheduler", "learning rate after the warm-up; constant has no warm-up",
        {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
         "wsd": "wsd"},
        "is not supported",
    ),
    "optimizer": Parameter(
        TEXT, "adamw_torch", "", "AdamW in fp32", {"adamw_torch": None, "adamw_torch_fused": None},
        "is not supported; others are train.optimizer in the job: --print-job > job.yaml",
    ),
    "weight_decay": Parameter(REAL, 0.0, "train.weight_decay", "on matrices only, not on norms and biases"),
    "max_grad_norm": Parameter(
        REAL, 1.0, "train.max_grad_norm", "gradients are clipped to this norm; 0: no clipping"
    ),
    "block_size": Parameter(
        INT, -1, "packing.block_size",
        "tokens per sequence; -1: the model's positions, at most max_seq_length",
    ),
    "max_seq_length": Parameter(
        INT, 2048, "packing.block_size", "upper limit of block_size -1; a positive block_size overrides it"
    ),
    "add_eos_token": Parameter(FLAG, True, "packing.add_eos_token", "end every document with EOS"),
    "padding": Parameter(
        TEXT, "right", "", "sequences are full; only the last ones are padded", {"right": None},
        "is not supported: a causal model trained on whole blocks is padded at the end",
    ),
    "peft": Parameter(FLAG, False, "adapter", "train a LoRA adapter, not all weights"),
    "lora_r": Parameter(INT, 16, "adapter.r", "rank of the adapter's matrices", needs=LORA),
    "lora_alpha": Parameter(REAL, 32, "adapter.alpha", "the output is scaled by alpha / r", needs=LORA),
    "lora_dropout": Parameter(REAL, 0.05, "adapter.dropout", "share of its inputs dropped", needs=LORA),
    "target_modules": Parameter(
        (str, list), "all-linear", "adapter.target_modules", "names separated by commas, or all-linear",
        needs=LORA,
    ),
    "merge_adapter": Parameter(
        FLAG, False, "", "P gets the adapter merged into its base (raydist export RUN --merge)", needs=LORA
    ),
    "quantization": Parameter(
        TEXT, None, "quantization", "bits of the frozen base's weights", {"int4": "int4", "int8": "int8"},
        "is not supported", LORA,
    ),
    "mixed_precision": Parameter(
        TEXT, None, "train.mixed_precision", "precision of forward and backward passes; none: fp32",
        {None: "fp32", "bf16": "bf16", "fp16": "fp16"},
        "is not supported",
    ),
    "gradient_checkpointing": Parameter(
        FLAG, False, "train.gradient_checkpointing", "recompute activations: slower, with less memory"
    ),
    "use_flash_attention_2": Parameter(
        FLAG, False, "model.attn_implementation", "use the flash-attn package",
        needs=("mixed_precision", "bf16"),
    ),
    "distributed_backend": Parameter(
        TEXT, None, "strategy", "ddp, fsdp, or deepspeed (ZeRO stage 3)",
        {None: {"name": "ddp"}, "ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"},
         "deepspeed": {"name": "zero", "stage": 3}},
        "is not supported",
    ),
    "seed": Parameter(INT, 42, "seed", "seed of data order, adapter and dropout"),
    "logging_steps": Parameter(INT, -1, "train.logging_steps", "steps between records; -1: 10"),
    "eval_strategy": Parameter(
        TEXT, "epoch", "eval.eval_steps", "no: nothing is held out or evaluated", WHEN, "is not supported"
    ),
    "eval_steps": Parameter(
        INT, 500, "eval.eval_steps", "steps between evaluations", needs=("eval_strategy", "steps")
    ),
    "save_strategy": Parameter(
        TEXT, "epoch", "checkpoint.save_steps", "no: only after the last step", WHEN, "is not supported"
    ),
    "save_steps": Parameter(
        INT, 500, "checkpoint.save_steps", "steps between checkpoints", needs=("save_strategy", "steps")
    ),
    "save_total_limit": Parameter(
        INT, 1, "checkpoint.save_total_limit", "newest checkpoints kept, in addition to the best"
    ),
    "load_best_model_at_end": Parameter(
        FLAG, False, "checkpoint.load_best_model_at_end", "take the best evaluated checkpoint, not the last"
    ),
    "metric_for_best_model": Parameter(
        TEXT, None, "", "metric of load_best_model_at_end", {None: None, "eval_loss": None},
        "is not supported: raydist compares evaluation losses", ("load_best_model_at_end", True),
    ),
    "log": Parameter(
        TEXT, "none", "tracking",
        "mlflow, tensorboard, wandb or none; metrics.jsonl and report.html are always written",
        {log: {name: name == log for name in ("mlflow", "tensorboard", "wandb")}
         for log in ("none", "mlflow", "tensorboard", "wandb")},
        "is not supported",
    ),
    "resume_from_checkpoint": Parameter(
        (bool, str), None, "", "submitting again always resumes; false: refuse to; a path: only the newest"
    ),
    "push_to_hub": Parameter(FLAG, False, "", "at the end, upload the model to USERNAME/<name>, private"),
    "username": Parameter(TEXT, None, "", "hub user or organization", needs=HUB),
    "token": Parameter(
        TEXT, "HF_TOKEN", "", "name of an environment variable, or of a file, with the hub's token", needs=HUB
    ),
}  # fmt: skip

ALIASES = {"train_batch_size": "batch_size", "model_max_length": "max_seq_length"}

OTHERS = {
    "chat_template apply_chat_template suggested_chat_template chat_format map_eos_token response_only_loss"
    " conversation_extension token_weights column_mapping runtime_mapping auto_convert_dataset"
    " *sharegpt_mapping*":
        "raw text has no messages, so there is nothing to put into a chat template",
    "model_ref dpo_beta max_prompt_length max_completion_length prompt_text_column rejected_text_column"
    " image_column":
        "it belongs to the trainers of preferences (DPO, ORPO, reward), which raydist does not have",
    "rl_*": "it belongs to reinforcement learning (PPO, GRPO), which raydist does not have",
    "use_distillation teacher_* student_* distill_*": "raydist does not distill",
    "use_sweep sweep_* wandb_sweep* post_trial_script":
        "sweeps are a job's `tune` section: --print-job > job.yaml, add it, raydist tune job.yaml",
    "unsloth": "its kernels replace the model's code; raydist trains transformers' own",
    "use_vllm vllm_* inference* sample_* deploy":
        "raydist trains; load the finished folder with transformers or vLLM to generate",
    "use_enhanced_eval eval_metrics eval_batch_size eval_save_predictions eval_benchmark custom_metrics":
        "raydist evaluates loss, perplexity and bits per byte; any benchmark can load the finished folder",
    "eval_dataset_path": "give the path as valid_split",
    "custom_loss* *forward_backward* manual_* optimizer_step_frequency grad_clip_value"
    " save_state_every_n_steps load_state_from gradient_accumulation_steps":
        "it controls AutoTrain's experimental loop; raydist has one loop (see gradient_accumulation,"
        " max_grad_norm, save_strategy)",
    "max_samples": "give a smaller file, or train.max_steps in the job: --print-job > job.yaml",
    "packing": "sequences are always packed, and attention does not cross documents",
    "disable_gradient_checkpointing": "it is off by default; gradient_checkpointing turns it on",
    "attn_implementation": "give use_flash_attention_2, or set model.attn_implementation in the job",
    "save_processed_data": "the tokens are always kept, in P/tokens",
    "repo_id": "the repository is username/<name of the project>; username may be an organization",
    "ddp_timeout": "when a worker does not answer, raydist ends the attempt and starts the next one",
    "wandb_run_id": "a resumed run continues its W&B run by itself",
}  # fmt: skip
"""Names, with *, of parameters of AutoTrain's other trainers and features -> why raydist refuses them."""
