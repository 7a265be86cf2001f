"""The DeepSpeed configuration of a job: what the job decides, and what a user's own JSON may add.

Where both set a key, the values must be equal. Any other key that would change the training is refused by
name. "auto", as in Hugging Face's examples, leaves a key to the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")
BUCKET_ELEMENTS = 2**25
"""134 MB of fp32. DeepSpeed's default takes 2 GB on each rank, even for a small model."""

FREE = (
    *("comms_logger", "communication_data_type", "flops_profiler", "memory_breakdown", "steps_per_print"),
    *(f"zero_optimization.{bucket}" for bucket in BUCKETS),
)
"""Keys that a user may set to any value."""

FREE_INSIDE = ("zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""Sections in which a user may set every key that the job does not set."""

DECIDED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer, train.lr and train.weight_decay",
    "scheduler": "train.scheduler",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "amp": "train.mixed_precision",
    "torch_autocast": "train.mixed_precision",
    "data_types": "train.mixed_precision",
    "activation_checkpointing": "train.gradient_checkpointing",
    "zero_optimization.stage": "strategy.stage",
    "zero_optimization.offload_optimizer": "strategy.offload",
    "zero_optimization.offload_param": "strategy.offload",
    "tensorboard": "tracking",
    "wandb": "tracking",
}


def deepspeed_config(
    stage: int, offload: str, own: Config, *, precision: str, max_grad_norm: float | None
) -> Config:
    """The job's configuration, merged with the user's `own` keys.

    Raises ValueError that names every key of `own` which contradicts the job, or which raydist does not use.
    """
    zero: Config = {"stage": stage, "offload_optimizer": {"device": offload}}
    zero |= dict.fromkeys(BUCKETS, BUCKET_ELEMENTS)
    if stage == 3:
        zero["offload_param"] = {"device": offload}
    config: Config = {
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam needs a compiler
        "steps_per_print": 2**31,
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True}
    problems = [*_merge(config, own, "")]
    if problems:
        raise ValueError("the DeepSpeed config contradicts the job:\n    " + "\n    ".join(problems))
    # DeepSpeed's own modes would round the weights and the rotary frequencies at the start
    for name in ("bf16", "fp16"):
        config.pop(name, None)
    config["torch_autocast"] = {"enabled": precision != "fp32", "dtype": "bfloat16"}
    if precision == "fp16":
        # without such modules gradients are summed in fp32, where scaled ones do not overflow
        config["torch_autocast"] |= {"dtype": "float16", "lower_precision_safe_modules": []}
    return config


def _merge(config: Config, own: Config, path: str) -> Iterator[str]:
    """Put the keys of `own` into `config`; yields the problems of keys that are refused."""
    for key, value in own.items():
        dotted, ours = f"{path}{key}", config.get(key)
        if isinstance(ours, dict) and isinstance(value, dict):
            yield from _merge(ours, value, f"{dotted}.")
        elif value == "auto" or (key in config and value == ours):
            continue
        elif dotted in FREE or (key not in config and path.rstrip(".") in FREE_INSIDE):
            config[key] = value
        elif not _is_off(value):
            yield f"{dotted}: {_why(dotted, value, ours)}"


def _is_off(value: Any) -> bool:
    """A section that is switched off contradicts nothing, whatever its other keys are."""
    return isinstance(value, dict) and value.get("enabled") in (False, "auto")


def _why(dotted: str, value: Any, ours: Any) -> str:
    section = next((name for name in DECIDED_BY if dotted == name or dotted.startswith(f"{name}.")), None)
    if section is None:
        return "raydist does not use this key; remove it"
    given = "" if ours is None else f" (which gives {ours!r})"
    return f"{value!r}, but the job decides this by {DECIDED_BY[section]}{given}; set it only there"
