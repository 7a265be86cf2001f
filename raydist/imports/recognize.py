"""Which trainer's config a file is, by its keys, and the job file that it becomes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raydist.errors import JobError
from raydist.imports import autotrain, axolotl, llama_factory
from raydist.imports.trainer import ONLY_TEXT
from raydist.job.load import read_yaml
from raydist.limits import read_limited

READ: dict[str, tuple[set[str], Callable[[dict[str, Any], Path], str]]] = {
    "AutoTrain": ({"task", "params.trainer", "data.train_split"}, autotrain.job_text),
    "LLaMA-Factory": (
        {"stage", "finetuning_type", "cutoff_len", "dataset_dir", "template"}, llama_factory.job_text
    ),
    "axolotl": ({"base_model", "pretraining_dataset", "sequence_len"}, axolotl.job_text),
}  # fmt: skip
"""Trainer -> keys, any of which is enough to know its file, and what makes a job of it."""

OTHERS: dict[str, tuple[set[str], str]] = {
    "a raydist job": ({"corpus.sources"}, "it needs no import: raydist plan FILE, raydist submit FILE"),
    "a DeepSpeed config": (
        {"zero_optimization", "train_micro_batch_size_per_gpu"}, "a job names it in strategy.config"
    ),
    "an accelerate config": (
        {"compute_environment", "distributed_type"},
        "it says how processes start and names neither model nor text; a job has scaling and strategy for it",
    ),
    "a torchtitan config": (
        {"job.dump_folder", "model.flavor", "parallelism", "training.seq_len"},
        "its model and its text are names in torchtitan's own code, not places that a job can read",
    ),
    "a torchtune config": ({"model._component_", "tokenizer._component_"}, ONLY_TEXT),
    "arguments of TRL or of Hugging Face's scripts": ({"model_name_or_path", "dataset_name"}, ONLY_TEXT),
}  # fmt: skip
"""Other kinds of files: keys that no other kind has, and why it is refused. One of the keys is enough."""


def imported(path: Path) -> tuple[str, str]:
    """(the trainer whose config `path` is, the text of its job file). Raises JobError for what is refused."""
    config = {str(key): value for key, value in _read(path).items()}
    keys = set(_dotted(config))
    for trainer, (own, job_text) in READ.items():
        if own & keys:
            return trainer, job_text(config, path)
    fix = f"raydist import reads configs of {', '.join(READ)}; raydist init writes a job to start from"
    for what, (own, why) in OTHERS.items():
        if own & keys:
            raise JobError(f"{path.name} is {what}", where=str(path), why=why, fix=fix)
    raise JobError(f"{path.name} is no config that raydist import knows", where=str(path), fix=fix)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() != ".toml":
        return read_yaml(path)[0]  # JSON too: it is YAML
    try:
        return tomllib.loads(read_limited(path))
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read {path}", why=str(error)) from error


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key, those of sections with the section's name and a dot before them."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
