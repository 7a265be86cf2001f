"""The rules between a job's keys: what no field can know by itself.

RULES is a list of (keys, rule). A rule is called with the values of its keys and returns what is wrong,
or "". It runs where each of its keys is valid by itself, whatever is wrong elsewhere. The problem is
reported at the first of its keys that is written, so the key most likely at fault stands first.

In a key, `*` gives the values under all names as a mapping {name: value}, null without any. `<each>`
calls the rule once for each name, with the name before the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from raydist.job.deepspeed import deepspeed_config
from raydist.storage import SHARED

if TYPE_CHECKING:
    from raydist.job.tune import Distribution

ALL, EACH = "*", "<each>"

Rule = Callable[..., str]
Named = Mapping[Any, Any] | None

LENGTHS = ("train.max_steps", "train.max_tokens", "train.epochs")


def _own_folder(name: str) -> str:
    return f"{name} is the folder that runs share, not a name for a run" if name in SHARED else ""


def _shared_file_system(storage: str) -> str:
    if "://" in storage:
        return f"storage {storage} is a URI: runs need a folder on a shared file system so far"
    return ""


# --- model


def _one_origin(base: str | None, config: Any) -> str:
    if (base is None) == (config is None):
        return "give exactly one of base (a pretrained model) and config (random weights)"
    return ""


def _has_model_type(config: Mapping[str, Any] | None) -> str:
    return (
        "config needs model_type, such as llama" if config is not None and "model_type" not in config else ""
    )


def _has_tokenizer(config: Any, tokenizer: Any, base: str | None) -> str:
    if config is not None and tokenizer is None and base is None:
        return "a model from config needs a tokenizer: a hub id, a folder or {train: {vocab_size: N}}"
    return ""


def _flash_in_16_bits(attention: str, precision: str) -> str:
    if attention == "flash_attention_2" and precision != "bf16":
        return "flash_attention_2 computes in 16 bits only; set train.mixed_precision: bf16"
    return ""


# --- corpus


def _weight_of_all(weights: Named) -> str:
    given = [weight is not None for weight in (weights or {}).values()]
    return "give every source a weight, or none" if any(given) and not all(given) else ""


def _weights_add_up(weights: Named) -> str:
    given = [weight for weight in (weights or {}).values() if weight is not None]
    if given and len(given) == len(weights or {}) and abs(sum(given) - 1) > 1e-6:
        return f"the weights add up to {sum(given):g}, not 1"
    return ""


def _no_epochs_of_a_mixture(epochs: int | None, weights: Named) -> str:
    if epochs is not None and any(weight is not None for weight in (weights or {}).values()):
        return "sources with weights need train.max_steps or train.max_tokens, not train.epochs"
    return ""


# --- length and batch


def _one_length(steps: Any, tokens: Any, epochs: Any, stages: Named) -> str:
    if not stages and sum(value is not None for value in (steps, tokens, epochs)) != 1:
        return "give exactly one of max_steps, max_tokens and epochs"
    return ""


def _length_of_stages(steps: Any, tokens: Any, epochs: Any, stages: Named) -> str:
    if stages and (steps, tokens, epochs) != (None, None, None):
        return "stages have lengths of their own: give no train.max_steps, max_tokens or epochs"
    return ""


def _epoch_needs_epochs(every: int | str, epochs: int | None) -> str:
    return "epoch needs train.epochs; give a number of steps" if every == "epoch" and epochs is None else ""


def _one_batch(size: int | None, tokens: int | None) -> str:
    if size is not None and tokens is not None:
        return "give one of global_batch_size and global_batch_tokens, not both"
    return ""


def _whole_blocks(tokens: int | None, block_size: int, stages: Named) -> str:
    if tokens is not None and not stages and tokens % block_size:
        return f"train.global_batch_tokens {tokens} is not a multiple of packing.block_size {block_size}"
    return ""


def _whole_blocks_of_stage(_: int, block_size: int, tokens: int | None) -> str:
    if tokens is not None and tokens % block_size:
        return f"train.global_batch_tokens {tokens} is not a multiple of a block_size of stages, {block_size}"
    return ""


# --- adapter and strategy


def _quantized_needs_adapter(quantization: str | None, adapter: Any) -> str:
    if quantization is not None and adapter is None:
        return f"{quantization} needs an adapter: quantized weights cannot be trained"
    return ""


def _quantized_is_whole(quantization: str | None, strategy: str) -> str:
    if quantization is not None and strategy == "fsdp":
        return (
            f"{quantization} does not work under strategy fsdp: FSDP2 shards a weight as a plain tensor and"
            " drops the scales that bitsandbytes keeps with it; take ddp or zero"
        )
    return ""


def _only_zero_has(key: str, value: Any, strategy: str) -> str:
    if strategy != "zero" and value not in (None, "none", {}):
        return f"name: {strategy} has no {key}; only zero has"
    return ""


def _zero_has_a_stage(strategy: str, stage: int | None) -> str:
    return "name: zero needs stage: 1, 2 or 3" if strategy == "zero" and stage is None else ""


def _deepspeed_agrees(
    own: dict[str, Any], strategy: str, stage: int | None, offload: str, precision: str, norm: float | None
) -> str:
    if strategy != "zero" or stage is None:
        return ""
    try:
        deepspeed_config(stage, offload, own, bf16=precision == "bf16", max_grad_norm=norm)
    except ValueError as error:
        return str(error)
    return ""


# --- a sweep

NOT_SEARCHED = {
    "name": "the sweep names its trials",
    "storage": "all trials share it",
    "cluster": "all trials share it",
    "tracking": "all trials share it",
    "scaling": "how many trials fit on the cluster is worked out from it once",
    "tune": "a sweep cannot search itself",
    "corpus": "trials are compared on the same held-out text",
    "eval": "trials are compared by the same evaluation",
    "model.tokenizer": "trials share one tokenization",
    "model.base": "trials share one tokenizer and one tokenization",
}
BATCH = ("packing.block_size", "train.global_batch_size", "train.global_batch_tokens")


def _one_distribution(_: str, of: Distribution) -> str:
    if sum(value is not None for value in (of.loguniform, of.uniform, of.choice, of.grid)) != 1:
        return "give exactly one of loguniform, uniform, choice and grid"
    return ""


def _range_has_width(_: str, of: Distribution) -> str:
    low, high = of.loguniform or of.uniform or (0, 1)
    return f"the range [{low:g}, {high:g}] is inverted or empty; low comes first" if low >= high else ""


def _positive_on_a_log_scale(_: str, of: Distribution) -> str:
    if of.loguniform is not None and of.loguniform[0] <= 0:
        return f"loguniform needs a low end above 0, not {of.loguniform[0]:g}"
    return ""


def _can_be_searched(key: str, _: Distribution) -> str:
    for shared, reason in NOT_SEARCHED.items():
        if key == shared or key.startswith(f"{shared}."):
            return f"{key} cannot be searched: {reason}"
    return ""


def _block_size_has_effect(key: str, _: Distribution, stages: Named) -> str:
    if key == "packing.block_size" and stages:
        return f"{key} has no effect next to stages, which have block sizes of their own"
    return ""


def _trials_see_equal_text(key: str, _: Distribution, steps: int | None) -> str:
    if key in BATCH and steps is not None:
        return "trials of equal steps would see unequal text; give train.max_tokens instead of max_steps"
    return ""


def _optuna_draws(searcher: str | None, grids: Named) -> str:
    names = [str(key) for key, grid in (grids or {}).items() if grid is not None]
    return (
        f"optuna has no grid ({', '.join(names)}); give choice instead"
        if names and searcher == "optuna"
        else ""
    )


def _number_of_trials(trials: int | None, grids: Named) -> str:
    if grids is None:
        return ""
    drawn = any(grid is None for grid in grids.values())
    points = math.prod(len(grid) for grid in grids.values() if grid is not None)
    if trials is None:
        return "say how many trials: only a grid has a number of its own" if drawn else ""
    if trials < points or (trials > points and not drawn):
        return f"trials: {trials}, but the grid has {points} points"
    return ""


def _budget_needs_a_length(budget: float | None, tokens: float | None) -> str:
    if budget is not None and tokens is None:
        return "tune.max_tokens, a budget, needs the length of a trial in train.max_tokens"
    return ""


def _budget_pays(budget: float | None, tokens: float | None) -> str:
    if budget is not None and tokens is not None and budget < tokens:
        return f"tune.max_tokens {budget:g} does not pay for one trial of train.max_tokens {tokens:g}"
    return ""


RULES: list[tuple[tuple[str, ...], Rule]] = [
    (("name",), _own_folder),
    (("storage",), _shared_file_system),
    (("model.base", "model.config"), _one_origin),
    (("model.config",), _has_model_type),
    (("model.config", "model.tokenizer", "model.base"), _has_tokenizer),
    (("model.attn_implementation", "train.mixed_precision"), _flash_in_16_bits),
    (("corpus.sources.*.weight",), _weight_of_all),
    (("corpus.sources.*.weight",), _weights_add_up),
    (("train.epochs", "corpus.sources.*.weight"), _no_epochs_of_a_mixture),
    ((*LENGTHS, "stages.*.max_tokens"), _one_length),
    ((*LENGTHS, "stages.*.max_tokens"), _length_of_stages),
    (("checkpoint.save_steps", "train.epochs"), _epoch_needs_epochs),
    (("eval.eval_steps", "train.epochs"), _epoch_needs_epochs),
    (("train.global_batch_size", "train.global_batch_tokens"), _one_batch),
    (("train.global_batch_tokens", "packing.block_size", "stages.*.max_tokens"), _whole_blocks),
    (("stages.<each>.block_size", "train.global_batch_tokens"), _whole_blocks_of_stage),
    (("quantization", "adapter"), _quantized_needs_adapter),
    (("quantization", "strategy.name"), _quantized_is_whole),
    (("strategy.stage", "strategy.name"), partial(_only_zero_has, "stage")),
    (("strategy.offload", "strategy.name"), partial(_only_zero_has, "offload")),
    (("strategy.config", "strategy.name"), partial(_only_zero_has, "config")),
    (("strategy.name", "strategy.stage"), _zero_has_a_stage),
    (
        (
            *("strategy.config", "strategy.name", "strategy.stage", "strategy.offload"),
            *("train.mixed_precision", "train.max_grad_norm"),
        ),
        _deepspeed_agrees,
    ),
    (("tune.search.<each>",), _one_distribution),
    (("tune.search.<each>",), _range_has_width),
    (("tune.search.<each>",), _positive_on_a_log_scale),
    (("tune.search.<each>",), _can_be_searched),
    (("tune.search.<each>", "stages.*.max_tokens"), _block_size_has_effect),
    (("tune.search.<each>", "train.max_steps"), _trials_see_equal_text),
    (("tune.searcher", "tune.search.*.grid"), _optuna_draws),
    (("tune.trials", "tune.search.*.grid"), _number_of_trials),
    (("tune.max_tokens", "train.max_tokens"), _budget_needs_a_length),
    (("tune.max_tokens", "train.max_tokens"), _budget_pays),
]
