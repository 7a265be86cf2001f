"""Keys of other trainers, and the keys of a job that have the same effect.

The names are those of Hugging Face's Trainer and run_clm, AutoTrain, axolotl, LLaMA-Factory, torchtitan
and nanochat. They are looked up for every unknown key, at the top of a job or in a section.
"""

from __future__ import annotations

from typing import NamedTuple


class Foreign(NamedTuple):
    """keys: dotted keys of the job, the nearest first; empty if it has none.  note: what differs, or why
    the job has no such key."""

    keys: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        if not self.keys:
            return self.note
        return f"its name in a job is {' or '.join(self.keys)}{f' ({self.note})' if self.note else ''}"


def _one(key: str, note: str = "") -> Foreign:
    return Foreign((key,), note)


_SIZE = "train.micro_batch_size"
_LENGTH = ("train.max_tokens", "train.max_steps", "train.epochs")
_GLOBAL = "the batch of one optimizer step, over all workers, is train.global_batch_size"
_PER_STEP = "sequences per optimizer step over all workers; accumulation follows from it"
_DATA = "each source under a name of your own, with a path"
_SPLIT = "a share of the documents, chosen by hash"
_DECAYS = "the job has min_lr_ratio and decay_ratio next to it"
_SHARE = "a share of the steps, not a number of them"
_RESUME = Foreign((), "the same command resumes the run of that name; it needs no key")
_OPTIMIZER = "adamw, adamw_8bit, adafactor or muon"
_PARALLEL = Foreign((), "the model is not split over workers this way; see strategy")
_HUB = Foreign((), "a run uploads nothing: the trained model is in <storage>/<name>/model")
_LOADER = Foreign((), "batches are read from prepared token logs; the loader has no settings")
_ADVICE: dict[tuple[str, ...], Foreign] = {
    # --- the run
    ("output_dir", "output_directory", "dump_folder", "out_dir", "project_name"): _one(
        "storage", "the run's folder is <storage>/<name>"
    ),
    ("dataset_prepared_path", "preprocessing_num_workers", "dataset_num_proc", "cache_dir"): _one(
        "storage", "token logs are kept in it and made on all CPUs of the cluster"
    ),
    ("run_name", "run", "experiment_name"): _one("name"),
    ("random_seed", "data_seed", "train_seed"): _one("seed"),
    ("resume_from_checkpoint", "auto_resume_from_checkpoints", "ignore_data_skip"): _RESUME,
    ("overwrite_output_dir", "overwrite_cache"): Foreign(
        (), "a run's folder is not overwritten; take a new name"
    ),
    ("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"): _HUB,
    ("do_train", "do_eval", "do_predict", "task", "trainer", "rl"): Foreign(
        (), "a job always trains and evaluates a causal model on raw text"
    ),
    # --- the model
    ("base_model", "model_name", "model_name_or_path", "model_path", "hf_assets_path"): _one("model.base"),
    ("config_name", "model_config", "base_model_config", "config_overrides", "flavor", "depth"): _one(
        "model.config", "with model_type, for a model from random weights"
    ),
    ("reinit_weights", "train_from_scratch"): _one("model.config", "in place of model.base"),
    ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "tokenizer_config"): _one(
        "model.tokenizer"
    ),
    ("flash_attention", "flash_attn", "use_flash_attention_2", "sdp_attention", "xformers_attention"): _one(
        "model.attn_implementation"
    ),
    ("model_type", "tokenizer_type", "processor_type", "is_llama_derived_model"): Foreign(
        (), "transformers chooses classes by the base's own config; for random weights see model.config"
    ),
    ("trust_remote_code",): Foreign((), "no code of a model's folder is run"),
    ("tokens", "new_tokens", "resize_vocab", "resize_token_embeddings"): _one(
        "model.add_tokens", "a list of new tokens, for which the embedding grows"
    ),
    ("special_tokens",): Foreign((), "the tokenizer is used as it is; model.tokenizer names another"),
    ("add_special_tokens", "new_special_tokens", "additional_special_tokens"): _one(
        "model.add_tokens", "ordinary tokens: in raw text, special tokens are text"
    ),
    ("plugins", "enable_liger_kernel", "liger_kernel", "use_unsloth", "use_unsloth_gc"): Foreign(
        (), "such kernels replace a model's code; raydist trains transformers' own, see train.compile"
    ),
    ("hf_hub_token", "hf_use_auth_token"): Foreign((), "the hub's token is read from HF_TOKEN"),
    # --- the text
    ("chat_template", "template", "train_on_inputs", "train_on_prompt", "mask_history", "default_system"): (
        Foreign((), "raw text has no messages, so there is nothing to put into a template")
    ),
    (
        *("datasets", "dataset", "dataset_name", "dataset_path", "dataset_dir", "dataset_config_name"),
        *(
            "pretraining_dataset",
            "train_file",
            "train_files",
            "train_path",
            "train_data",
            "data",
            "data_path",
        ),
        *("data_files", "data_dir", "interleave_probs", "mix_strategy"),
    ): _one("corpus.sources", _DATA),
    ("test_datasets", "eval_dataset", "eval_file", "valid_split", "validation_file"): _one(
        "eval.sources", _DATA
    ),
    ("val_set_size", "val_size", "validation_split_percentage", "validation_split", "test_size"): _one(
        "corpus.holdout", _SPLIT
    ),
    ("text_field", "dataset_text_field", "text_key"): _one("corpus.sources.*.text_column"),
    ("dataset_exact_deduplication", "deduplicate"): _one("corpus.dedup", "exact"),
    ("streaming",): _one("prepare.wait", "training begins while text is still prepared; auto"),
    ("shuffle", "shuffle_merged_datasets", "buffer_size", "shuffle_buffer_size"): _one(
        "packing.window_shards", "blocks are always shuffled, within windows of so many shards"
    ),
    # --- sequences
    (
        *("sequence_len", "sequence_length", "seq_len", "seq_length", "cutoff_len", "context_length"),
        *("max_seq_length", "max_seq_len", "max_length", "model_max_length", "block_size"),
    ): _one("packing.block_size"),
    ("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "neat_packing", "group_by_length"): _one(
        "packing.strategy", "documents are always packed into full sequences"
    ),
    ("sample_packing_group_size", "packing_strategy"): _one("packing.strategy"),
    ("add_bos", "prepend_bos"): _one("packing.add_bos_token", "auto, true or false"),
    ("add_eos", "append_eos"): _one("packing.add_eos_token"),
    # --- length and batch
    ("num_train_epochs", "num_epochs", "n_epochs"): _one("train.epochs"),
    ("num_iterations", "max_iters", "total_steps", "num_steps", "steps", "num_train_steps"): _one(
        "train.max_steps"
    ),
    ("num_tokens", "total_tokens", "max_train_tokens", "target_param_data_ratio", "max_samples"): Foreign(
        _LENGTH, "exactly one of them"
    ),
    (
        *("batch_size", "micro_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
        *("device_batch_size", "local_batch_size", "train_batch_size", "per_gpu_train_batch_size"),
    ): _one(_SIZE, f"per worker; {_GLOBAL}"),
    ("auto_find_batch_size",): _one(_SIZE, f"auto; {_GLOBAL}"),
    ("per_device_eval_batch_size", "eval_batch_size"): _one(
        _SIZE, "evaluation takes batches of the same size"
    ),
    ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum_steps"): _one(
        "train.global_batch_size", _PER_STEP
    ),
    ("global_batch", "effective_batch_size"): _one("train.global_batch_size", _PER_STEP),
    ("total_batch_size", "batch_size_tokens", "tokens_per_step"): _one(
        "train.global_batch_tokens", "tokens per optimizer step over all workers"
    ),
    # --- the optimization
    ("learning_rate", "max_lr", "peak_lr", "matrix_lr"): _one("train.lr"),
    ("embedding_lr", "unembedding_lr", "embedding_lr_scale"): _one("train.embedding_learning_rate"),
    ("lr_scheduler_type", "lr_scheduler", "scheduler_type", "decay_type"): _one("train.scheduler", _DECAYS),
    ("warmup_steps", "num_warmup_steps", "warmup_iters", "warmup"): _one("train.warmup_ratio", _SHARE),
    ("min_lr", "final_lr_frac", "min_lr_factor", "cosine_min_lr_ratio", "lr_scheduler_kwargs"): _one(
        "train.min_lr_ratio", "the last lr over train.lr"
    ),
    ("decay_steps", "warmdown_ratio", "cooldown_steps"): _one("train.decay_ratio", _SHARE),
    ("wd", "adam_weight_decay"): _one("train.weight_decay"),
    ("gradient_clipping", "grad_clip", "max_norm", "clip_grad_norm", "gradient_clip_val"): _one(
        "train.max_grad_norm"
    ),
    ("bf16", "fp16", "tf32", "float16", "bfloat16", "pure_bf16", "fp16_full_eval"): _one(
        "train.mixed_precision", "bf16, fp16 or fp32"
    ),
    ("dtype", "torch_dtype", "precision"): _one("train.mixed_precision", "bf16, fp16 or fp32"),
    ("activation_checkpoint", "activation_checkpointing", "disable_gradient_checkpointing"): _one(
        "train.gradient_checkpointing", "true, false, selective, or n for every n-th layer"
    ),
    ("gradient_checkpointing_kwargs", "use_gradient_checkpointing", "ac_mode"): _one(
        "train.gradient_checkpointing", "true, false, selective, or n for every n-th layer"
    ),
    ("data_collator", "collate_fn"): _one("train.collator"),
    ("optim", "optimizer", "optimizer_name", "optimizer_type", "optim_args"): _one(
        "train.optimizer", _OPTIMIZER
    ),
    ("use_muon", "use_adafactor", "adafactor", "use_galore", "use_apollo", "use_badam"): _one(
        "train.optimizer", _OPTIMIZER
    ),
    ("optim_target_modules",): _one(
        "train.optimizer.name", "muon takes the matrices of the layers by itself"
    ),
    ("adam_beta1", "adam_beta2", "beta1", "beta2"): _one("train.optimizer.betas", "both, as [0.9, 0.999]"),
    ("adam_epsilon", "epsilon", "eps"): _one("train.optimizer.eps"),
    ("torch_compile", "compile"): _one("train.compile", "auto, true or false"),
    # --- adapters and quantization
    ("peft", "lora", "finetuning_type", "use_peft", "adapter_type", "lora_config", "peft_config"): _one(
        "adapter", "adapter: {r: 16} trains a LoRA adapter; null trains all weights"
    ),
    ("lora_r", "lora_rank", "peft_r"): _one("adapter.r"),
    ("lora_alpha",): _one("adapter.alpha"),
    ("lora_dropout",): _one("adapter.dropout"),
    ("lora_target_modules", "lora_target", "lora_target_linear"): _one("adapter.target_modules"),
    ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_method", "bnb_4bit_quant_type"): _one(
        "quantization", "int4 or int8, with an adapter"
    ),
    ("quantization_config", "bnb_config"): _one("quantization", "int4 or int8, with an adapter"),
    ("lora_model_dir", "adapter_name_or_path"): Foreign(
        (), "a run begins with a fresh adapter; merge an older one into the base"
    ),
    ("lora_modules_to_save", "additional_target"): _one("adapter.modules_to_save"),
    (
        *("peft_use_dora", "use_dora", "peft_use_rslora", "use_rslora", "loraplus_lr_ratio", "pissa_init"),
        *("peft_init_lora_weights", "loftq_config"),
    ): Foreign((), "plain LoRA is the only kind of adapter so far"),
    # --- workers
    ("deepspeed", "deepspeed_config", "zero_stage", "zero"): _one(
        "strategy.stage", "with strategy.name: zero; strategy.config takes the rest of DeepSpeed's file"
    ),
    ("fsdp", "fsdp_config", "fsdp_version", "data_parallel_shard_degree"): _one("strategy.name", "fsdp"),
    ("ddp", "data_parallel_replicate_degree", "distributed_backend"): _one("strategy.name", "ddp"),
    ("ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"): Foreign(
        (), "the strategy has no such setting"
    ),
    (
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "context_parallel_degree",
        "context_parallel_size",
        "sequence_parallel_degree",
        "tensor_parallel_size",
        "parallelism",
    ): _PARALLEL,
    (
        "num_gpus",
        "n_gpus",
        "nproc",
        "nproc_per_node",
        "num_processes",
        "world_size",
        "ngpu",
        "ray_num_workers",
    ): _one("scaling.num_workers", "one per GPU"),
    ("nnodes", "num_nodes", "num_machines"): _one("scaling.num_workers", "over all nodes, one per GPU"),
    ("use_cpu", "no_cuda", "device", "device_type", "accelerator"): _one(
        "scaling.use_gpu", "true, false or auto"
    ),
    ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"): _LOADER,
    ("dataloader_drop_last", "remove_unused_columns"): _LOADER,
    # --- checkpoints, evaluation, records
    (
        "saves_per_epoch",
        "save_strategy",
        "save_every",
        "save_interval",
        "checkpoint_interval",
        "interval",
    ): _one("checkpoint.save_steps", "steps, or epoch"),
    ("max_checkpoints", "keep_latest_k", "num_checkpoints"): _one("checkpoint.save_total_limit"),
    ("load_best_model", "metric_for_best_model", "greater_is_better"): _one(
        "checkpoint.load_best_model_at_end", "by the evaluation's loss"
    ),
    ("early_stopping", "early_stopping_patience", "early_stopping_threshold"): Foreign(
        (), "a run goes on to its last step; checkpoint.load_best_model_at_end keeps the best evaluated model"
    ),
    ("evals_per_epoch", "eval_strategy", "evaluation_strategy", "eval_every", "eval_interval"): _one(
        "eval.eval_steps", "steps, or epoch"
    ),
    ("eval_tokens", "eval_iters", "max_eval_samples", "eval_max_batches"): _one(
        "eval.max_tokens", "per source"
    ),
    ("log_freq", "log_interval", "log_every", "log_steps", "logging_strategy", "logging"): _one(
        "train.logging_steps", "steps between records"
    ),
    ("plot_loss",): Foreign((), "every run draws its curves, in report.html"),
    ("report_to", "log_with", "logger"): Foreign(
        ("tracking.mlflow", "tracking.tensorboard", "tracking.wandb"), "each of them is switched on by itself"
    ),
    ("wandb_project", "wandb_name", "wandb_entity", "use_wandb", "enable_wandb", "wandb_run_id"): _one(
        "tracking.wandb", "true, or a project's name"
    ),
    ("mlflow_tracking_uri", "mlflow_experiment_name", "use_mlflow"): _one(
        "tracking.mlflow", "true, or a tracking URI"
    ),
    ("use_tensorboard", "enable_tensorboard", "logging_dir", "tensorboard_dir"): _one("tracking.tensorboard"),
}

FOREIGN: dict[str, Foreign] = {name: advice for names, advice in _ADVICE.items() for name in names}
"""Another trainer's key -> what it is in a job. A job's own key in the wrong section needs no entry, unless
several sections have a key of that name."""


def foreign(name: str) -> Foreign | None:
    """The entry for `name`, in which dashes stand for underscores, as on a command line."""
    return FOREIGN.get(name.replace("-", "_").lower())
