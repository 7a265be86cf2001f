"""What axolotl and LLaMA-Factory share: the arguments of Hugging Face's Trainer, as keys of a job."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from raydist.autotrain.params import gpus
from raydist.imports.data import listed
from raydist.imports.draft import Draft
from raydist.job.text import parse_json
from raydist.limits import read_limited

ONLY_TEXT = "raydist trains on raw text, by the next token; it has no instructions, chats or preferences"

SCHEDULERS = {
    "cosine": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear", "constant": "constant",
    "constant_with_warmup": "constant", "warmup_stable_decay": "wsd",
}  # fmt: skip
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_torch_npu_fused", "paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "adamw_8bit"),
    "adafactor": "adafactor",
    "muon": "muon",
}


def put_training(draft: Draft) -> None:
    """Length, batch size, learning rate, optimizer, precision, strategy, checkpoints and evaluations."""
    draft.take_over("learning_rate", "weight_decay", "seed", "logging_steps", "save_total_limit")
    put_length(draft)
    put_warmup(draft)
    put_scheduler(draft)
    put_optimizer(draft)
    put_precision(draft)
    put_strategy(draft)
    put_interval(draft, "checkpoint.save_steps", "save_strategy", "save_steps", "saves_per_epoch")
    put_interval(draft, "eval.eval_steps", "eval_strategy", "eval_steps", "evals_per_epoch")
    put_trackers(draft)
    if (norm := draft.take_number("max_grad_norm")) is not None:
        draft.set("train.max_grad_norm", norm or None, "max_grad_norm", norm)
    if is_on(draft.take("load_best_model_at_end")):
        draft.set("checkpoint.load_best_model_at_end", True, "load_best_model_at_end")
    if is_on(draft.take("torch_compile")):
        draft.set("train.compile", True, "torch_compile")
    if is_on(draft.take("dataset_exact_deduplication")):
        draft.set("corpus.dedup", "exact", "dataset_exact_deduplication", True)


def is_on(value: Any) -> bool:
    """As YAML 1.1 reads a flag, in which both trainers' files are written."""
    return value is True or str(value).lower() in ("true", "yes", "on", "1")


def put_length(draft: Draft) -> None:
    """A number of steps overrides one of epochs, as in the Trainer."""
    name = "num_epochs" if "num_epochs" in draft.defaults else "num_train_epochs"
    is_given = draft.given(name)
    epochs, steps = draft.take_number(name) or 1, draft.take_number("max_steps")
    if steps is not None and steps > 0:
        draft.set("train.max_steps", steps, "max_steps")
        if is_given:
            draft.note(name, epochs, "max_steps sets the length")
        return
    whole = math.ceil(epochs)
    if whole != epochs:
        draft.note(name, epochs, f"a job has whole epochs: {whole} here; for a part, give train.max_steps")
    draft.set("train.epochs", whole, name, epochs)


def put_batch(draft: Draft, micro_name: str) -> None:
    """micro_name: the key of the sequences per device and forward pass."""
    workers = draft.take_number("ray_num_workers")
    if workers is None:
        workers = gpus() or 1
        draft.comments["scaling.num_workers"] = (
            f"{workers}: the config does not say on how many GPUs it runs, and this machine has"
            f" {gpus() or 'none'}; with another number, train.global_batch_size changes in proportion"
        )
    micro = draft.take_number(micro_name) or 1
    accumulated = draft.take_number("gradient_accumulation_steps") or 1
    total = draft.take_number("batch_size") or micro * accumulated * workers
    draft.set("scaling.num_workers", workers, "ray_num_workers")
    draft.set("train.global_batch_size", total, "gradient_accumulation_steps", accumulated)
    by_itself = is_on(draft.take("auto_find_batch_size"))
    draft.set("train.micro_batch_size", "auto" if by_itself else micro, micro_name, micro)


def put_warmup(draft: Draft) -> None:
    """To be called once the length is known. A number of steps overrides a share, as in the Trainer."""
    given = draft.given("warmup_ratio")
    steps, ratio = draft.take_number("warmup_steps"), draft.take_number("warmup_ratio")
    name = "warmup_steps" if steps else "warmup_ratio"
    if steps and steps >= 1:
        length = draft.values["train"].get("max_steps")
        if length is None:
            why = "train.warmup_ratio is a share of the steps; raydist plan says how many steps there are"
            draft.note("warmup_steps", steps, why)
            return
        ratio = steps / length
    elif steps or (steps == 0 and not given):
        ratio = steps  # below 1: a share
    draft.set("train.warmup_ratio", ratio or 0.0, name, steps or ratio)


def put_scheduler(draft: Draft) -> None:
    """To be called once lr, length and warm-up are known."""
    name = "lr_scheduler" if "lr_scheduler" in draft.defaults else "lr_scheduler_type"
    asked, options = str(draft.take(name)), draft.take("lr_scheduler_kwargs")
    train = draft.values["train"]
    if asked in SCHEDULERS:
        draft.set("train.scheduler", SCHEDULERS[asked], name, asked)
    else:
        draft.note(name, asked, "it is not supported; cosine is taken")
    if asked == "constant":
        train["warmup_ratio"] = 0.0  # the Trainer's has no warm-up
    for option, value in options.items() if isinstance(options, dict) else ():
        origin, number = f"lr_scheduler_kwargs.{option}", isinstance(value, int | float)
        if option == "min_lr_rate":
            draft.set("train.min_lr_ratio", value, origin)
        elif option == "min_lr" and number and train.get("lr"):
            draft.set("train.min_lr_ratio", value / train["lr"], origin, value)
        elif option == "num_decay_steps" and number and "max_steps" in train:
            draft.set("train.decay_ratio", value / train["max_steps"], origin, value)
        else:
            draft.note(
                origin, value, "train.min_lr_ratio and train.decay_ratio are what a job has of that kind"
            )


def put_optimizer(draft: Draft) -> None:
    name = "optimizer" if "optimizer" in draft.defaults else "optim"
    asked = str(draft.take(name))
    if asked in OPTIMIZERS:
        draft.set("train.optimizer.name", OPTIMIZERS[asked], name, asked)
    else:
        draft.note(name, asked, "it is not supported; adamw is taken")
    draft.take_over("adam_epsilon")
    first, second = draft.take_number("adam_beta1"), draft.take_number("adam_beta2")
    if first is not None or second is not None:
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
        draft.set("train.optimizer.betas", betas, "adam_beta1, adam_beta2")


def put_precision(draft: Draft) -> None:
    """fp16 counts where bf16 is not asked for; axolotl's bf16: auto means bf16 where the GPU has it."""
    half = is_on(draft.take("fp16")) | is_on(draft.take("float16"))
    asked = draft.given("bf16") or draft.given("bfloat16")
    brain = draft.take("bf16")
    brain = is_on(brain) or brain == "auto" or is_on(draft.take("bfloat16"))
    if is_on(draft.take("pure_bf16")):
        brain = asked = True
        draft.note("pure_bf16", True, "weights are updated in fp32 whatever train.mixed_precision is")
    precision = "fp16" if half and not (asked and brain) else "bf16" if brain else "fp32"
    draft.set("train.mixed_precision", precision, "bf16")


def put_strategy(draft: Draft) -> None:
    deepspeed, fsdp = draft.take("deepspeed"), draft.take("fsdp")
    if deepspeed:
        stage, offload = zero_stage(deepspeed)
        if stage is None:
            draft.note("deepspeed", deepspeed, "its ZeRO stage cannot be read here; strategy.stage takes it")
        elif stage > 0:
            draft.set("strategy.name", "zero", "deepspeed", deepspeed)
            draft.set("strategy.stage", stage, "deepspeed", deepspeed)
            draft.set("strategy.offload", "cpu" if offload else "none", "deepspeed", deepspeed)
            why = f"taken from it: stage {stage}; strategy.config takes further keys of DeepSpeed's"
            draft.note("deepspeed", deepspeed, why)
    elif fsdp or draft.given("fsdp_config"):
        draft.set("strategy.name", "fsdp", "fsdp", fsdp)


def zero_stage(config: Any) -> tuple[int | None, bool]:
    """The ZeRO stage of a DeepSpeed config, and whether it offloads to the CPU. None: it is not known.

    config: a mapping, or the path of a file; if there is no such file, its name may say both.
    """
    if isinstance(config, str):
        try:
            config = parse_json(read_limited(Path(config).expanduser()))
        except (OSError, ValueError):
            named = re.search(r"z(?:ero)?[_-]?([0-3])(?![0-9])", Path(config).stem.lower())
            return (int(named[1]) if named else None), "offload" in Path(config).stem.lower()
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else {}
    if not isinstance(zero, dict):
        return None, False
    parts = [zero.get(f"offload_{part}") for part in ("optimizer", "param")]
    stage = zero.get("stage", 0)
    offload = any(isinstance(part, dict) and part.get("device") == "cpu" for part in parts)
    return (stage if stage in (0, 1, 2, 3) else None), offload


def put_interval(draft: Draft, key: str, strategy_name: str, steps_name: str, per_epoch_name: str) -> None:
    """Steps between checkpoints or evaluations, which a job counts in steps or in one epoch."""
    strategy, steps, per_epoch = (draft.take(n) for n in (strategy_name, steps_name, per_epoch_name))
    if per_epoch == 1 or strategy == "epoch":
        draft.set(key, "epoch", per_epoch_name if per_epoch else strategy_name, per_epoch or strategy)
    elif per_epoch:
        draft.note(per_epoch_name, per_epoch, f"{key} is a number of steps, or epoch")
    elif strategy == "no" or strategy is False:
        draft.note(strategy_name, strategy, f"there is always one at the end; {key} has those before it")
    elif steps is not None:
        draft.set(key, steps, steps_name)


def put_trackers(draft: Draft) -> None:
    asked = draft.take("report_to")
    if asked is not None:
        names = listed(asked)
        for name in ("mlflow", "tensorboard", "wandb"):
            draft.set(f"tracking.{name}", name in names or "all" in names, "report_to", asked)
        others = [n for n in names if n not in ("mlflow", "tensorboard", "wandb", "all", "none")]
        if others:
            draft.note("report_to", asked, f"a job has no {', '.join(map(str, others))}")
    for flag, key in (("use_mlflow", "mlflow"), ("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if is_on(draft.take(flag)):
            draft.set(f"tracking.{key}", True, flag)
    for place, key in (("mlflow_tracking_uri", "mlflow"), ("wandb_project", "wandb")):
        if value := draft.take(place):
            draft.set(f"tracking.{key}", value, place)


def put_attention(draft: Draft, asked: Any, name: str) -> None:
    """Only what transformers itself has is asked for by name; raydist's auto chooses among the others."""
    if asked in ("sdpa", "eager"):
        draft.set("model.attn_implementation", asked, name)
    elif asked not in (None, False, "auto", "disabled"):
        why = "model.attn_implementation: auto is taken, the fastest here that keeps documents apart;"
        draft.note(name, asked, f"{why} flash_attention_2 needs the package flash-attn")


def put_adapter(draft: Draft, target: Any, name: str, saved_name: str) -> None:
    """target: names of modules, in a list or between commas, or all; null: raydist's default, all-linear.

    name: the key that says so.  saved_name: the key of the modules that are trained whole.
    """
    draft.take_over("lora_r", "lora_rank", "lora_alpha", "lora_dropout")
    if target not in ("all", "all-linear"):
        target = names(target)
    draft.set("adapter.target_modules", target if isinstance(target, list) else "all-linear", name, target)
    if saved := names(draft.take(saved_name)):
        draft.set("adapter.modules_to_save", saved, saved_name)


def put_tokens(draft: Draft, name: str) -> None:
    """name: the key of new tokens, in a list or between commas."""
    if tokens := names(draft.take(name)):
        draft.set("model.add_tokens", tokens, name)


def names(given: Any) -> Any:
    """Those between commas, as a list; all else as it is."""
    return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given


def put_recomputed(draft: Draft) -> None:
    asked = draft.take("gradient_checkpointing")
    if asked not in (None, False):
        draft.set("train.gradient_checkpointing", True, "gradient_checkpointing", asked)
        if not is_on(asked):
            draft.note("gradient_checkpointing", asked, "activations are recomputed in the ordinary way")


def put_holdout(draft: Draft, name: str) -> None:
    """name: the key of the validation set's size, a share or a number of documents."""
    size = draft.take_number(name) or 0.0
    if size >= 1:
        draft.note(
            name, size, "corpus.holdout is a share of the documents, chosen by hash; its default is 0.005"
        )
    else:
        draft.set("corpus.holdout", float(size), name, size)
