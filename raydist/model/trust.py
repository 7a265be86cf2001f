"""What a base or an adapter may decide, and what is refused before transformers or peft reads it.

Their folders are data of somebody else. No code in them or named by them runs: no module, no kernel from the
hub, no library of a quantization method, no pickle. Nor may their numbers ask for more than a machine has.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist.errors import ModelError, RaydistError
from raydist.limits import oversized

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

os.environ.setdefault("USE_HUB_KERNELS", "0")  # transformers reads it when it is imported

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every call that takes it: where it is left out, transformers asks on the terminal."""

SAFE: dict[str, Any] = {"use_safetensors": True, **NO_CODE}
"""For every call that loads weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

QUANTIZED = ("bitsandbytes", "mxfp4", "fp8")
"""Ways to store weights that need no further library: transformers itself dequantizes the latter two."""


def read_config(base: str, where: str = "model.base") -> PretrainedConfig:
    """The configuration of `base`, a folder or a hub id, without its choice of attention and experts.

    Raises ModelError for what is refused, and what transformers raises for what it cannot read.
    """
    from transformers import AutoConfig
    from transformers import PretrainedConfig as AnyConfig

    _check_files(Path(base), where)
    if (Path(base) / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{base} holds an adapter",
            where=where,
            why="transformers would put it on its base in silence, and train another model than the base",
            fix=f"merge it (raydist export --merge, or peft), or move {ADAPTER_CONFIG} out of the folder",
        )
    values, _ = AnyConfig.get_config_dict(base)
    if not isinstance(values, dict):
        raise ModelError(f"the config.json of {base} is not an object", where=where)
    _check_quantization(base, values, where)
    check_sizes(values, ModelError, f"config.json of {base}")
    config: PretrainedConfig = AutoConfig.from_pretrained(base, **NO_CODE)
    config._attn_implementation = config._experts_implementation = None
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") in ("mxfp4", "fp8"):
        stored["dequantize"] = True  # else kernels from the hub
    return config


def read_adapter_config(folder: Path) -> PeftConfig:
    """The configuration of the LoRA adapter in `folder`. Raises ModelError for any other kind of adapter."""
    from peft import PeftConfig

    _check_files(folder, str(folder))
    values = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    plain = isinstance(values, dict) and values.get("peft_type") == "LORA"
    if not plain or values.get("megatron_config"):
        raise ModelError(
            f"the adapter in {folder} is not a plain LoRA adapter",
            where=str(folder / ADAPTER_CONFIG),
            why="other kinds name tokenizers and modules, which peft would import",
            fix="merge it into its base with peft, and train that model",
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"there is no {ADAPTER_WEIGHTS} in {folder}", **_no_pickles(folder))
    config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    return config


def check_shards(base: str, names: Mapping[str, Any], where: str) -> None:
    """names: {tensor: file} of an index. ModelError for a file that is no safetensors file of the base."""
    for name in dict.fromkeys(str(name) for name in names.values()):
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (inside and name.endswith(".safetensors")):
            raise ModelError(
                f"the index of {base} names {name}, which is not a safetensors file of that folder",
                where=where,
                why="a pickle runs code when it is opened",
                fix="take the model's safetensors files and their own index",
            )


def no_weights(folder: Path) -> ModelError:
    """For a folder with a configuration and no safetensors file."""
    return ModelError(f"{folder} cannot be used: it has no model.safetensors", **_no_pickles(folder))


def check_sizes(values: Mapping[str, Any], kind: type[RaydistError], where: str) -> None:
    """Raises `kind` for sizes in a configuration that no machine holds, before anything of them is made."""
    layers, experts = [1], [1]
    for key, value in _numbers(values):
        limit = next((limit for pattern, limit in _LIMITS if pattern.search(key)), None)
        if limit is not None and not value <= limit:
            raise kind(
                f"{key} is {str(value)[:40]}, and {limit:,} is the most that is allowed",
                where=where,
                why="such a model fits no machine; reading on would fill this one's memory",
                fix="correct the number",
            )
        if limit is not None and "layer" in key:
            layers.append(int(value))
        if limit is not None and "expert" in key:
            experts.append(int(value))
    if (modules := max(layers) * max(experts)) > _MOST_MODULES:
        raise kind(
            f"{max(layers):,} layers of {max(experts):,} experts are {modules:,} modules",
            where=where,
            why=f"{_MOST_MODULES:,} is the most that is allowed",
            fix="correct the numbers",
        )


_LIMITS = (
    (re.compile(r"(^|\.)(num_\w*layers|n_layers?|num_blocks|n_blocks?)$"), 10_000),
    (re.compile(r"(^|\.)(num\w*experts|n_\w*experts|moe_num_experts)$"), 10_000),
    (re.compile(r"(^|\.)(num_\w*heads|n_heads?|num_\w*groups|n_groups?)$"), 2**16),
    (re.compile(r"(^|\.)vocab_size$"), 2**32),
    (re.compile(r"(^|\.)(n_embd|n_inner|d_model|d_ff|d_kv|\w*head_dim)$"), 2**21),
    (re.compile(r"(hidden|intermediate|ffn)_(size|dim)$"), 2**21),
    (re.compile(r"(^|\.)(max_position_embeddings|n_positions|n_ctx|max_sequence_length)$"), 2**32),
)  # fmt: skip
"""(keys, the largest value). The largest models known have a few hundred layers, of width 2^15."""

_MOST_MODULES = 1_000_000


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield path, values if isinstance(values, int) or not math.isnan(values) else math.inf


def _check_files(folder: Path, where: str) -> None:
    """Raises ModelError for files that would be read without end. Nothing for a hub id."""
    if problem := oversized(folder):
        raise ModelError(problem, where=where, fix="copy the model from its source again")


def _check_quantization(base: str, values: Mapping[str, Any], where: str) -> None:
    for stored in _quantizations(values):
        loads = stored.get("load_in_4bit") or stored.get("load_in_8bit")
        method = str(stored.get("quant_method") or ("bitsandbytes" if loads else None))
        if method not in QUANTIZED:
            raise ModelError(
                f"the weights of {base} are stored by the quantization method {method}",
                where=where,
                why="transformers would import the library of that method, or fetch code for it from the hub",
                fix=f"take the model unquantized, or as one of {', '.join(QUANTIZED)}",
            )


def _quantizations(values: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key in ("quantization_config", "compression_config") and isinstance(value, Mapping):
                yield value
            else:
                yield from _quantizations(value)


def _no_pickles(folder: Path) -> dict[str, str]:
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not found:
        return {"where": str(folder), "fix": "copy the model from its source again, with its *.safetensors"}
    return {
        "where": ", ".join(found[:3]) + ", ..." * (len(found) > 3),
        "why": "these are pickles, which run code when they are opened",
        "fix": "take the model's safetensors files, or load and save it with transformers where you trust it",
    }
