"""An axolotl config as a job: raw text, by `type: completion` data sets or a `pretraining_dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydist.autotrain.params import run_name
from raydist.errors import JobError
from raydist.imports.data import BUILDERS, add_source, listed, places, source
from raydist.imports.draft import Draft, file_text
from raydist.imports.trainer import (
    ONLY_TEXT,
    is_on,
    put_adapter,
    put_attention,
    put_batch,
    put_holdout,
    put_recomputed,
    put_tokens,
    put_training,
)

DEFAULTS: dict[str, Any] = {
    "output_dir": "./model-out", "seed": 42, "sequence_len": 512,
    "val_set_size": 0.0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused", "lr_scheduler": "cosine", "weight_decay": 0.0, "bf16": "auto",
    "warmup_ratio": 0.03,  # in axolotl at most 100 steps
    "lora_dropout": 0.0,
}  # fmt: skip


def job_text(config: dict[str, Any], path: Path) -> str:
    """The job file for the config in `path`. Raises JobError for one that is not about raw text."""
    _check(config, path)
    draft = Draft(dict(config), DEFAULTS)
    folder = str(draft.take("output_dir"))
    draft.values |= {"name": run_name(Path(folder)), "storage": folder}
    draft.take_over("base_model", "tokenizer_config")
    _put_data(draft)
    put_tokens(draft, "tokens")
    draft.take_over("sequence_len", "cosine_min_lr_ratio", "embedding_lr")
    for name in ("sample_packing", "pad_to_sequence_len", "strict"):
        if is_on(config.get(name)):
            draft.take(name)  # always so
    put_batch(draft, "micro_batch_size")
    put_training(draft)
    _put_adapter(draft)
    put_recomputed(draft)
    _put_attention(draft)
    draft.finish()
    return file_text("axolotl", path, draft.values, draft.comments)


def _check(config: dict[str, Any], path: Path) -> None:
    """Raises JobError for what is not training of a causal model on raw text."""
    what = ""
    kinds = {kind for entry in listed(config.get("datasets")) if (kind := _other_kind(entry))}
    other = next((name for name in OTHER_AIMS if config.get(name)), None)
    if rl := config.get("rl"):
        what = f"an axolotl config for preferences or rewards (rl: {rl})"
    elif other:
        what = f"an axolotl config for another aim than the next token ({other})"
    elif kinds:
        what = f"an axolotl config with data sets of type {', '.join(sorted(kinds))}"
    elif config.get("adapter") not in (None, False, "", "lora", "qlora"):
        raise JobError(
            f"an axolotl config for adapter: {config['adapter']}", where=str(path),
            why="raydist trains all weights, or a LoRA adapter", fix="run it with axolotl",
        )  # fmt: skip
    if what:
        raise JobError(what, where=str(path), why=ONLY_TEXT, fix=f"run it with axolotl; {RAW}")
    if not any(config.get(name) for name in ("datasets", "pretraining_dataset")):
        raise JobError("an axolotl config without data", where=str(path), why="a job needs text", fix=RAW)


OTHER_AIMS = ("diffusion", "reward_model", "process_reward_model", "kd_trainer")
RAW = "for raw text, give datasets of type: completion, or a pretraining_dataset"


def _other_kind(entry: Any) -> str:
    """The type of a data set that is not raw text; "" for one that is."""
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind is None:
        return "none, which axolotl takes as tokens"
    if isinstance(kind, dict):
        return "a prompt of its own"
    return "" if str(kind).split(":")[0] in ("completion", "pretrain") else str(kind)


def _put_data(draft: Draft) -> None:
    sources: dict[str, Any] = {}
    for name in ("pretraining_dataset", "datasets"):
        _add(sources, draft, name)
    draft.values["corpus"] = {"sources": sources}
    held_out: dict[str, Any] = {}
    _add(held_out, draft, "test_datasets")
    if held_out:
        draft.values["eval"] = {"sources": held_out}
    put_holdout(draft, "val_set_size")


def _add(sources: dict[str, Any], draft: Draft, key: str) -> None:
    for number, entry in enumerate(listed(draft.take(key))):
        at = f"{key}[{number}]"
        left = dict(entry) if isinstance(entry, dict) else {"path": entry}
        left = {name: value for name, value in left.items() if value is not None}
        path, files = str(left.pop("path", "")), [str(file) for file in listed(left.pop("data_files", None))]
        split, kind = str(left.pop("split", "train")), left.pop("ds_type", None)
        column = str(left.pop("field", None) or left.pop("text_column", "text"))
        left.pop("type", None)
        if not split.isidentifier():
            draft.note(f"{at}.split", split, "a source is whole; train is taken")
            split = "train"
        found = places(draft, f"{at}.path", path, files, str(left.pop("name", "")), split)
        kind = path if path in BUILDERS else kind
        add_source(sources, found[0] if path in BUILDERS else path, source(found, column, kind))
        for name, value in left.items():
            draft.note(f"{at}.{name}", value, "a source of a job has no such key")


def _put_adapter(draft: Draft) -> None:
    kind, bits8, bits4 = (draft.take(name) for name in ("adapter", "load_in_8bit", "load_in_4bit"))
    if not kind:
        return
    every, some = is_on(draft.take("lora_target_linear")), draft.take("lora_target_modules")
    put_adapter(draft, "all" if every else some, "lora_target_modules", "lora_modules_to_save")
    if kind == "qlora" or is_on(bits4):
        draft.set("quantization", "int4", "load_in_4bit", True)
    elif is_on(bits8):
        draft.set("quantization", "int8", "load_in_8bit", True)


def _put_attention(draft: Draft) -> None:
    put_attention(draft, draft.take("attn_implementation"), "attn_implementation")
    for name, asked in (("sdp_attention", "sdpa"), ("eager_attention", "eager")):
        if is_on(draft.take(name)):
            put_attention(draft, asked, name)
    for name in ("flash_attention", "xformers_attention", "flex_attention"):
        put_attention(draft, is_on(draft.take(name)), name)
