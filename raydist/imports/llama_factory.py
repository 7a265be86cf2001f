"""A LLaMA-Factory config as a job: that of its pre-training, `stage: pt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydist.autotrain.params import run_name
from raydist.errors import JobError
from raydist.imports.data import add_source, listed, places, source
from raydist.imports.draft import Draft, file_text, number
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
from raydist.job.text import parse_json
from raydist.limits import read_limited

DEFAULTS: dict[str, Any] = {
    "output_dir": "saves", "dataset_dir": "data", "seed": 42, "cutoff_len": 2048,
    "val_size": 0.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0, "learning_rate": 5e-5, "optim": "adamw_torch", "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0, "weight_decay": 0.0, "finetuning_type": "lora", "lora_rank": 8, "lora_dropout": 0.0,
    "lora_target": "all",
}  # fmt: skip

BITS: dict[float, str] = {4: "int4", 8: "int8"}
INFO = "dataset_info.json"


def job_text(config: dict[str, Any], path: Path) -> str:
    """The job file for the config in `path`. Raises JobError for one that is not about raw text."""
    _check(config, path)
    draft = Draft(dict(config), DEFAULTS)
    folder = str(draft.take("output_dir"))
    draft.values |= {"name": run_name(Path(str(draft.take("run_name") or folder))), "storage": folder}
    draft.take_over("model_name_or_path", "cutoff_len")
    for name in ("stage", "do_train", "packing"):
        if config.get(name) is not False:
            draft.take(name)  # always so
    put_tokens(draft, "add_tokens")
    if "add_tokens" in draft.values.get("model", {}):
        draft.take("resize_vocab")  # always so
    put_batch(draft, "per_device_train_batch_size")
    put_training(draft)
    _put_data(draft, path)
    if draft.given("neat_packing"):
        apart = is_on(draft.take("neat_packing"))
        draft.set("packing.document_mask", apart, "neat_packing")
    if draft.take("finetuning_type") == "lora":
        _put_adapter(draft)
    if not is_on(draft.take("disable_gradient_checkpointing")):  # it is on by default
        draft.left.setdefault("gradient_checkpointing", True)
    put_recomputed(draft)
    put_attention(draft, draft.take("flash_attn"), "flash_attn")
    draft.finish()
    return file_text("LLaMA-Factory", path, draft.values, draft.comments)


def _check(config: dict[str, Any], path: Path) -> None:
    """Raises JobError for what is not training of a causal model on raw text."""
    stage, method = config.get("stage", "sft, the default"), config.get("finetuning_type", "lora")
    if stage != "pt":
        raise JobError(
            f"a LLaMA-Factory config for stage {stage}", where=str(path), why=ONLY_TEXT,
            fix="run it with LLaMA-Factory; its stage for raw text is pt",
        )  # fmt: skip
    if method not in ("full", "lora"):
        raise JobError(
            f"a LLaMA-Factory config for finetuning_type: {method}", where=str(path),
            why="raydist trains all weights, or a LoRA adapter", fix="run it with LLaMA-Factory",
        )  # fmt: skip
    if not config.get("dataset"):
        raise JobError(
            "a LLaMA-Factory config without data", where=str(path), why="a job needs text",
            fix=f"name data sets of {INFO} in its key dataset",
        )  # fmt: skip


# --- data


def _put_data(draft: Draft, path: Path) -> None:
    """To be called once the length is known: weights need a number of steps."""
    folder = str(draft.take("dataset_dir"))
    info = _read_info(folder)
    sources, held_out = (
        {name: _source(draft, name, info, folder, path) for name in _names(draft.take(key))}
        for key in ("dataset", "eval_dataset")
    )
    draft.values["corpus"] = {"sources": {}}
    for name, made in sources.items():
        add_source(draft.values["corpus"]["sources"], name, made)
    _put_weights(draft)
    if held_out:
        draft.values["eval"] = draft.values.get("eval", {}) | {"sources": {}}
        for name, made in held_out.items():
            add_source(draft.values["eval"]["sources"], name, made)
    put_holdout(draft, "val_size")


def _names(given: Any) -> list[str]:
    """Between commas, or in a list."""
    names = given.split(",") if isinstance(given, str) else listed(given)
    return [str(name).strip() for name in names]


def _read_info(folder: str) -> dict[str, Any] | None:
    """What `dataset_info.json` says of each data set by name; None if it is not there or damaged."""
    try:
        info = parse_json(read_limited(Path(folder).expanduser() / INFO))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def _source(draft: Draft, name: str, info: dict[str, Any] | None, folder: str, path: Path) -> dict[str, Any]:
    entry = (info or {}).get(name)
    if not isinstance(entry, dict):
        known = f"it is not in {folder}/{INFO}" if info else f"there is no {folder}/{INFO} here"
        draft.note(f"dataset {name}", folder, f"{known}: correct the path and text_column of this source")
        return source([str(Path(folder) / name)], "text")
    if entry.get("formatting", "alpaca") != "alpaca" or entry.get("ranking"):
        raise JobError(
            f"the data set {name} of a LLaMA-Factory config is not raw text", where=str(path), why=ONLY_TEXT,
            fix=f"name one whose entry in {folder}/{INFO} has a column of text as its prompt",
        )  # fmt: skip
    columns = entry.get("columns") or {"prompt": "instruction", "query": "input"}
    column, query = str(columns.get("prompt", "instruction")), columns.get("query")
    if query:
        draft.note(
            f"{name}.columns.query", query, f"a source has one column, here {column}; {query} is left out"
        )
    for key in ("num_samples", "folder"):
        if entry.get(key) is not None:
            draft.note(f"{name}.{key}", entry[key], "a source of a job has no such key")
    hub = entry.get("hf_hub_url")
    if hub and "/" in str(hub):
        split = str(entry.get("split", "train"))
        found = places(draft, name, str(hub), [], str(entry.get("subset") or ""), split)
    else:
        remote = entry.get("cloud_file_name") or entry.get("file_name")
        place = str(remote or name)
        found = places(draft, name, place if "://" in place else str(Path(folder) / place), [])
    return source(found, column)


def _put_weights(draft: Draft) -> None:
    """interleave_probs: a share of each data set."""
    sources, shares = draft.values["corpus"]["sources"], draft.take("interleave_probs")
    mixed = str(draft.take("mix_strategy") or "concat") != "concat"
    if not mixed or shares is None:
        return
    if "max_steps" not in draft.values["train"]:
        why = (
            "a weight needs train.max_steps or max_tokens in place of epochs; each source is read as a whole"
        )
        draft.note("interleave_probs", shares, why)
        return
    for made, share in zip(sources.values(), _names(shares), strict=False):
        made["weight"] = number(share)


def _put_adapter(draft: Draft) -> None:
    bits = draft.take_number("quantization_bit")
    rank = draft.left.get("lora_rank", DEFAULTS["lora_rank"])
    if not draft.given("lora_alpha") and isinstance(rank, int):
        draft.left["lora_alpha"] = 2 * rank  # LLaMA-Factory's default
    put_adapter(draft, draft.take("lora_target"), "lora_target", "additional_target")
    if bits in BITS:
        draft.set("quantization", BITS[bits], "quantization_bit", bits)
    elif bits is not None:
        draft.note("quantization_bit", bits, "quantization is int4 or int8")
