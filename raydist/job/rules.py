"""The rules between a job's keys, which no field can check by itself.

RULES is a list of (keys, rule). A rule is called with the values of its keys and returns what is wrong,
or "". It runs where each of its keys is valid by itself, whatever is wrong elsewhere. The problem is
reported at the first of its keys that is written, so the key that is most likely wrong comes first.

In a key, `*` gives the values under all names as a mapping {name: value}, or None if there are none.
`<each>` calls the rule once for each name; the name comes before the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from raydist.errors import JobError
from raydist.job.deepspeed import deepspeed_config
from raydist.storage import SHARED, Storage

if TYPE_CHECKING:
    from raydist.job.tune import Distribution

ALL, EACH = "*", "<each>"

Rule = Callable[..., str]
Named = Mapping[Any, Any] | None

DEFAULT_GLOBAL_BATCH_SIZE = 32
"""Sequences, where a job gives neither them nor tokens."""

LENGTHS = ("train.max_steps", "train.max_tokens", "train.epochs")


def _name_is_not_reserved(name: str) -> str:
    return f"{name} is the folder that runs share, not a name for a run" if name in SHARED else ""


def _is_a_place(storage: str) -> str:
    try:
        Storage(storage)
    except JobError as error:
        return f"{error.what}: {error.why}; {error.fix}"
    return ""


# --- model


def _base_or_config(base: str | None, config: Any) -> str:
    if (base is None) == (config is None):
        return "give exactly one of base (a pretrained model) and config (random weights)"
    return ""


def _has_model_type(config: Mapping[str, Any] | None) -> str:
    return (
        "config needs model_type, such as llama" if config is not None and "model_type" not in config else ""
    )


def _config_needs_tokenizer(config: Any, tokenizer: Any, base: str | None) -> str:
    if config is not None and tokenizer is None and base is None:
        return "a model from config needs a tokenizer: a hub id, a folder or {train: {vocab_size: N}}"
    return ""


def _flash_needs_16_bits(attention: str, precision: str) -> str:
    if attention == "flash_attention_2" and precision == "fp32":
        return "flash_attention_2 computes in 16 bits only; set train.mixed_precision: bf16 (or fp16)"
    return ""


def _only_a_base_gets_tokens(added: Any, base: str | None) -> str:
    if added and base is None:
        return "a model from config has its tokenizer's vocabulary: name a tokenizer that has these tokens"
    return ""


def _one_tokenizer(added: Any, tokenizer: Any) -> str:
    if isinstance(added, str) and tokenizer is not None:
        return "add_tokens names a tokenizer, and model.tokenizer another; give one of the two"
    return ""


def _new_tokens_are_trained(added: Any, adapter: Any) -> str:
    if added and adapter is not None and not adapter.modules_to_save:
        return (
            "an adapter does not train the new tokens' embeddings; set adapter.modules_to_save to the names"
            " of the embedding and the head, most often [embed_tokens, lm_head]"
        )
    return ""


# --- corpus


def _weights_for_all_or_none(weights: Named) -> str:
    given = [weight is not None for weight in (weights or {}).values()]
    return "give every source a weight, or none" if any(given) and not all(given) else ""


def _weights_add_up(weights: Named) -> str:
    given = [weight for weight in (weights or {}).values() if weight is not None]
    if given and len(given) == len(weights or {}) and abs(sum(given) - 1) > 1e-6:
        return f"the weights add up to {sum(given):g}, not 1"
    return ""


def _no_epochs_with_weights(epochs: int | None, weights: Named) -> str:
    if epochs is not None and any(weight is not None for weight in (weights or {}).values()):
        return "sources with weights need train.max_steps or train.max_tokens, not train.epochs"
    return ""


def _a_source_is_learned(replay: Named) -> str:
    if replay and all(replay.values()):
        return "every source is replayed, so there is none to learn; replay is for text that the base knows"
    return ""


def _replay_leaves_one_source(replay: Named, weights: Named) -> str:
    others = [value for value in (replay or {}).values() if not value]
    if 1 < len(others) < len(replay or {}) and not any((weights or {}).values()):
        return (
            f"with replay and {len(others)} other sources, give every source a weight: nothing says how much"
            " of each the model is to learn"
        )
    return ""


def _no_epochs_with_replay(epochs: int | None, replay: Named) -> str:
    if epochs is not None and any((replay or {}).values()):
        return "replayed sources have a weight (0.05) and need train.max_steps or max_tokens, not epochs"
    return ""


def _delimiter_is_no_quote(name: str, delimiter: str | None, quote: str | None) -> str:
    if quote is not None and quote == delimiter:
        return f"{name} has {quote!r} for delimiter and quote; set quote: none if nothing is quoted"
    return ""


# --- length and batch


def _one_length(steps: Any, tokens: Any, epochs: Any, stages: Named) -> str:
    if not stages and sum(value is not None for value in (steps, tokens, epochs)) != 1:
        return "give exactly one of max_steps, max_tokens and epochs"
    return ""


def _no_length_next_to_stages(steps: Any, tokens: Any, epochs: Any, stages: Named) -> str:
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


# --- extensions


def _extends_whole_steps(extend: Any, epochs: int | None) -> str:
    if extend and epochs is not None:
        return "a run of epochs cannot be extended: it may end within a step"
    return ""


def _extends_no_stages(extend: Any, stages: Named) -> str:
    return "a run with stages cannot be extended" if extend and stages else ""


def _extends_no_sweep(extend: Any, tune: Any) -> str:
    if extend and tune is not None:
        return "a sweep's trials are new runs, and only a finished run is extended"
    return ""


def _goes_on_learning(extend: Any, scheduler: str, least: float) -> str:
    if scheduler != "constant" and least == 0 and any(not each.rewarm for each in extend):
        return (
            f"rewarm: false keeps the learning rate at which the run ended, and {scheduler} with min_lr_ratio"
            " 0 ended at 0, so nothing would be learned; take rewarm: true"
        )
    return ""


# --- adapter and strategy


def _quantized_needs_adapter(quantization: str | None, adapter: Any) -> str:
    if quantization is not None and adapter is None:
        return f"{quantization} needs an adapter: quantized weights cannot be trained"
    return ""


def _only_for_zero(key: str, value: Any, strategy: str) -> str:
    if strategy != "zero" and value not in (None, "none", {}):
        return f"name: {strategy} has no {key}; only zero has"
    return ""


def _zero_has_a_stage(strategy: str, stage: int | None) -> str:
    return "name: zero needs stage: 1, 2 or 3" if strategy == "zero" and stage is None else ""


def _selective_not_under_stage_3(recomputed: bool | int | str, stage: int | None) -> str:
    if recomputed == "selective" and stage == 3:
        return (
            "selective does not work under zero stage 3: DeepSpeed gathers weights within the recomputation,"
            " by operations that the forward pass did not have; take true or a number, or fsdp"
        )
    return ""


def _deepspeed_config_agrees(
    own: dict[str, Any], strategy: str, stage: int | None, offload: str, precision: str, norm: float | None
) -> str:
    if strategy != "zero" or stage is None:
        return ""
    try:
        deepspeed_config(stage, offload, own, precision=precision, max_grad_norm=norm)
    except ValueError as error:
        return str(error)
    return ""


# --- optimizer

_FLAT = "DeepSpeed steps parts of flattened weights"
NOT_SHARDED = {
    ("adafactor", "fsdp"): "torch's Adafactor cannot take the norms of sharded columns; take ddp",
    ("adafactor", "zero"): f"{_FLAT}, which have no rows and columns; take ddp",
    ("adamw_8bit", "fsdp"): "bitsandbytes' kernels take no sharded weights; take ddp",
    (
        "adamw_8bit",
        "zero",
    ): f"{_FLAT}, where 256 values of several weights share a scale, so that no checkpoint"
    " could be resumed with another number of workers; take ddp",
    ("muon", "zero"): f"{_FLAT}, and Muon needs whole matrices; take ddp or fsdp",
}
"""(optimizer, strategy) -> why they do not work together, and what to do."""


def _can_be_sharded(optimizer: Any, strategy: str) -> str:
    reason = NOT_SHARDED.get((optimizer.name, strategy))
    return f"{optimizer.name} does not work under strategy {strategy}: {reason}" if reason else ""


def _can_be_compiled(asked: Any, strategy: str) -> str:
    if asked is True and strategy == "zero":
        return (
            "layers are not compiled under strategy zero: DeepSpeed gathers weights by hooks within them,"
            " which a compiler cannot see; take train.compile: auto, or fsdp"
        )
    return ""


def _adafactor_has_no(key: str, value: Any, optimizer: str) -> str:
    if optimizer == "adafactor" and value is not None:
        return f"adafactor has no {key}; only adamw, adamw_8bit and muon have"
    return ""


def _embeddings_are_trained(rate: float | None, adapter: Any) -> str:
    if rate is not None and adapter is not None and not adapter.modules_to_save:
        return "an adapter does not train embeddings; adapter.modules_to_save names whole modules to train"
    return ""


# --- workers

WORKERS = "scaling.num_workers"
Range = int | tuple[int, int]


def _every_worker_has_a_sequence(
    workers: Range, size: int | None, tokens: int | None, block_size: int, stages: Named
) -> str:
    """A run of a fixed number may have idle workers; one that grows would restart to get them."""
    if isinstance(workers, int):
        return ""
    longest = max([*(stages or {}).values()] or [block_size])
    batch = tokens // longest if tokens is not None else size or DEFAULT_GLOBAL_BATCH_SIZE
    if workers[1] <= batch:
        return ""
    given = f"{tokens:,} tokens in blocks of {longest:,}" if tokens is not None else "train.global_batch_size"
    return (
        f"{list(workers)} goes up to {workers[1]} workers, and a step has {batch} sequences ({given}):"
        f" {workers[1] - batch} workers would have none; take at most {batch}, or a larger global batch"
    )


def _only_a_range_grows(after: float | str, workers: Range) -> str:
    if after != "auto" and isinstance(workers, int):
        return f"a run of {workers} workers does not grow; grow_after is for num_workers: [least, most]"
    return ""


def _trials_have_a_number(workers: Range, tune: Any) -> str:
    if tune is not None and not isinstance(workers, int):
        return (
            f"a sweep's trials have a number of workers, not a range as {list(workers)}: how many trials have"
            " room at a time is worked out once, and those that run would take each other's room"
        )
    return ""


# --- guards

LEAST_THRESHOLD, MOST_THRESHOLD = 3.0, 100.0
LEAST_SCORED = 20


def scored_from(window: int) -> int:
    """Steps that must be in a window before another step is compared with it: half of it, and at least 20."""
    return max(LEAST_SCORED, window // 2)


def _spikes_are_rare(threshold: float) -> str:
    if threshold < LEAST_THRESHOLD:
        share = math.erfc(threshold / math.sqrt(2))  # two figures, each above it with half of this chance
        return (
            f"at {threshold:g} deviations about {share:.2%} of all good steps would be skipped, by chance"
            f" alone; take {LEAST_THRESHOLD:g} or more"
        )
    return ""


def _spikes_can_be_found(threshold: float) -> str:
    if threshold > MOST_THRESHOLD:
        return (
            f"nothing would ever be a spike: where losses vary by 1%, one would have to be"
            f" {1 + threshold / 100:,.4g} times their median; take {MOST_THRESHOLD:g} or less"
        )
    return ""


def _window_fills_up(
    window: int,
    mode: str,
    steps: int | None,
    tokens: float | None,
    batch: int | None,
    batch_tokens: int | None,
    block_size: int,
    stages: Named,
) -> str:
    if tokens is not None and not stages:
        steps = math.ceil(tokens / (batch_tokens or (batch or DEFAULT_GLOBAL_BATCH_SIZE) * block_size))
    if mode == "on" and steps is not None and steps <= scored_from(window):
        why = f"window: {window} needs {scored_from(window)} steps before the first can be a spike"
        fix = f"take {2 * (steps // 3)} or less, or mode: record" if steps > 30 else "take mode: record"
        return f"no spike would be found: {why}, and the run has {steps}; {fix}"
    return ""


# --- a sweep

NOT_SEARCHED = {
    "name": "the sweep names its trials",
    "storage": "all trials share it",
    "cluster": "all trials share it",
    "tracking": "all trials share it",
    "scaling": "it decides how many trials fit on the cluster, which is computed once",
    "tune": "a sweep cannot search itself",
    "corpus": "trials are compared on the same held-out text",
    "eval": "trials are compared by the same evaluation",
    "model.tokenizer": "trials share one tokenization",
    "model.add_tokens": "trials share one tokenization",
    "model.base": "trials share one tokenizer and one tokenization",
}
BATCH = ("packing.block_size", "train.global_batch_size", "train.global_batch_tokens")


def _one_distribution(_: str, searched: Distribution) -> str:
    kinds = (searched.loguniform, searched.uniform, searched.choice, searched.grid)
    if sum(kind is not None for kind in kinds) != 1:
        return "give exactly one of loguniform, uniform, choice and grid"
    return ""


def _range_has_width(_: str, searched: Distribution) -> str:
    low, high = searched.loguniform or searched.uniform or (0, 1)
    return f"the range [{low:g}, {high:g}] is inverted or empty; low comes first" if low >= high else ""


def _positive_on_a_log_scale(_: str, searched: Distribution) -> str:
    if searched.loguniform is not None and searched.loguniform[0] <= 0:
        return f"loguniform needs a low end above 0, not {searched.loguniform[0]:g}"
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


def _optuna_has_no_grid(searcher: str | None, grids: Named) -> str:
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
        return "give the number of trials: only a grid has a number of its own" if drawn else ""
    if trials < points or (trials > points and not drawn):
        return f"trials: {trials}, but the grid has {points} points"
    return ""


def _budget_needs_a_length(budget: float | None, tokens: float | None) -> str:
    if budget is not None and tokens is None:
        return "tune.max_tokens, a budget, needs the length of a trial in train.max_tokens"
    return ""


def _budget_covers_one_trial(budget: float | None, tokens: float | None) -> str:
    if budget is not None and tokens is not None and budget < tokens:
        return f"tune.max_tokens {budget:g} is too small for one trial of train.max_tokens {tokens:g}"
    return ""


RULES: list[tuple[tuple[str, ...], Rule]] = [
    (("name",), _name_is_not_reserved),
    (("storage",), _is_a_place),
    (("model.base", "model.config"), _base_or_config),
    (("model.config",), _has_model_type),
    (("model.config", "model.tokenizer", "model.base"), _config_needs_tokenizer),
    (("model.add_tokens", "model.base"), _only_a_base_gets_tokens),
    (("model.add_tokens", "model.tokenizer"), _one_tokenizer),
    (("model.add_tokens", "adapter"), _new_tokens_are_trained),
    (("model.attn_implementation", "train.mixed_precision"), _flash_needs_16_bits),
    (("corpus.sources.*.weight",), _weights_for_all_or_none),
    (("corpus.sources.*.weight",), _weights_add_up),
    (("train.epochs", "corpus.sources.*.weight"), _no_epochs_with_weights),
    (("corpus.sources.*.replay",), _a_source_is_learned),
    (("corpus.sources.*.replay", "corpus.sources.*.weight"), _replay_leaves_one_source),
    (("train.epochs", "corpus.sources.*.replay"), _no_epochs_with_replay),
    (("corpus.sources.<each>.delimiter", "corpus.sources.<each>.quote"), _delimiter_is_no_quote),
    (("eval.sources.<each>.delimiter", "eval.sources.<each>.quote"), _delimiter_is_no_quote),
    ((*LENGTHS, "stages.*.max_tokens"), _one_length),
    ((*LENGTHS, "stages.*.max_tokens"), _no_length_next_to_stages),
    (("checkpoint.save_steps", "train.epochs"), _epoch_needs_epochs),
    (("eval.eval_steps", "train.epochs"), _epoch_needs_epochs),
    (("train.global_batch_size", "train.global_batch_tokens"), _one_batch),
    (("train.global_batch_tokens", "packing.block_size", "stages.*.max_tokens"), _whole_blocks),
    (("stages.<each>.block_size", "train.global_batch_tokens"), _whole_blocks_of_stage),
    (("train.extend", "train.epochs"), _extends_whole_steps),
    (("train.extend", "stages.*.max_tokens"), _extends_no_stages),
    (("train.extend", "tune"), _extends_no_sweep),
    (("train.extend", "train.scheduler", "train.min_lr_ratio"), _goes_on_learning),
    (("quantization", "adapter"), _quantized_needs_adapter),
    (("strategy.stage", "strategy.name"), partial(_only_for_zero, "stage")),
    (("strategy.offload", "strategy.name"), partial(_only_for_zero, "offload")),
    (("strategy.config", "strategy.name"), partial(_only_for_zero, "config")),
    (("strategy.name", "strategy.stage"), _zero_has_a_stage),
    (("train.gradient_checkpointing", "strategy.stage"), _selective_not_under_stage_3),
    (
        (
            *("strategy.config", "strategy.name", "strategy.stage", "strategy.offload"),
            *("train.mixed_precision", "train.max_grad_norm"),
        ),
        _deepspeed_config_agrees,
    ),
    (("train.embedding_learning_rate", "adapter"), _embeddings_are_trained),
    (("train.optimizer", "strategy.name"), _can_be_sharded),
    (("train.compile", "strategy.name"), _can_be_compiled),
    (("train.optimizer.betas", "train.optimizer.name"), partial(_adafactor_has_no, "betas")),
    (("train.optimizer.eps", "train.optimizer.name"), partial(_adafactor_has_no, "eps")),
    (
        (
            *(WORKERS, "train.global_batch_size", "train.global_batch_tokens", "packing.block_size"),
            "stages.*.block_size",
        ),
        _every_worker_has_a_sequence,
    ),
    (("scaling.grow_after", WORKERS), _only_a_range_grows),
    ((WORKERS, "tune"), _trials_have_a_number),
    (("guards.threshold",), _spikes_are_rare),
    (("guards.threshold",), _spikes_can_be_found),
    (
        (
            *("guards.window", "guards.mode", "train.max_steps", "train.max_tokens"),
            *("train.global_batch_size", "train.global_batch_tokens", "packing.block_size"),
            "stages.*.max_tokens",
        ),
        _window_fills_up,
    ),
    (("tune.search.<each>",), _one_distribution),
    (("tune.search.<each>",), _range_has_width),
    (("tune.search.<each>",), _positive_on_a_log_scale),
    (("tune.search.<each>",), _can_be_searched),
    (("tune.search.<each>", "stages.*.max_tokens"), _block_size_has_effect),
    (("tune.search.<each>", "train.max_steps"), _trials_see_equal_text),
    (("tune.searcher", "tune.search.*.grid"), _optuna_has_no_grid),
    (("tune.trials", "tune.search.*.grid"), _number_of_trials),
    (("tune.max_tokens", "train.max_tokens"), _budget_needs_a_length),
    (("tune.max_tokens", "train.max_tokens"), _budget_covers_one_trial),
]
