"""What a job would cost, from a sample of its files and its model's configuration. Starts nothing."""

from __future__ import annotations

import math
from typing import Any

from raydist.corpus.build import estimate, plan_log
from raydist.corpus.tokenizer import TokenizerSpec, planned_tokenizer
from raydist.job.plan import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS, Plan, make_plan
from raydist.job.schema import Job, Train
from raydist.model.build import Sizes, check_fits, load_config, model_sizes
from raydist.model.head import rows_at_once
from raydist.parallel.optimizer import state_bytes
from raydist.storage import Storage

FP32, BF16 = 4, 2
BYTES_PER_TOKEN_OF_NEW_BPE = 3.0
"""Assumed for a tokenizer that the job has yet to train; measured on a log once there is one."""


def plan_job(job: Job) -> dict[str, Any]:
    """Data, steps, parameters, memory per worker by part and disk, all in bytes or counts."""
    storage = Storage(job.storage).resolve()
    tokenizer = planned_tokenizer(job, storage)
    sources = {name: _source(job, name, tokenizer, storage) for name in job.corpus.sources}
    tokens = sum(source["tokens"] for source in sources.values()) * (1 - job.corpus.holdout)
    documents = sum(source["documents"] for source in sources.values())
    eos = documents if job.packing.add_eos_token else 0
    blocks = max(1, round((tokens + eos) / job.block_sizes[0]))
    weighted = any(source.weight is not None for source in job.corpus.sources.values())
    known = None if weighted or job.stages else blocks
    micro = GPU_MICRO_BATCH_TOKENS if job.scaling.use_gpu is True else CPU_MICRO_BATCH_TOKENS
    plan = make_plan(job, job.scaling.num_workers, known, micro)
    config = load_config(job, tokenizer.vocab_size if tokenizer else _new_vocabulary(job))
    check_fits(config, job)
    sizes = model_sizes(config, job)
    return {
        "name": job.name,
        "data": {
            "sources": sources,
            "blocks": blocks,
            "tokenizer": "to be trained" if tokenizer is None else "ready",
        },
        "steps": _steps(plan),
        "parameters": {"total": sizes.total, "trainable": sizes.trainable},
        "memory_per_worker_bytes": worker_memory(job, plan, sizes),
        "disk_bytes": _disk(job, sizes, int(tokens)),
    }


def _new_vocabulary(job: Job) -> int:
    assert job.model.tokenizer is not None and not isinstance(job.model.tokenizer, str)
    return job.model.tokenizer.train.vocab_size


def _source(job: Job, name: str, tokenizer: TokenizerSpec | None, storage: Storage) -> dict[str, Any]:
    """Documents and tokens of one source; a log that is complete is counted, not estimated."""
    plan = plan_log(job.corpus.sources[name], job.corpus, tokenizer, storage.tokens)
    guess = estimate(plan)
    n_tokens = guess.n_tokens if tokenizer else round(guess.n_bytes / BYTES_PER_TOKEN_OF_NEW_BPE)
    return {
        "files": plan.n_files,
        "file_bytes": plan.n_bytes,
        "slices": plan.n_slices,
        "documents": guess.n_documents,
        "tokens": n_tokens,
        "text_bytes": guess.n_bytes,
        "mean_tokens": n_tokens / max(1, guess.n_documents),
        "mean_words": guess.mean_words,
        "unique_share": guess.unique_share,
        "log": "complete" if tokenizer and plan.complete else "to be made",
    }


def _steps(plan: Plan) -> dict[str, Any]:
    return {
        "optimizer_steps": plan.steps,
        "samples": plan.samples,
        "tokens_per_step": plan.tokens_per_step,
        "stages": [{"block_size": stage.block_size, "steps": stage.steps} for stage in plan.stages],
        "workers": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
    }


def worker_memory(job: Job, plan: Plan, sizes: Sizes) -> dict[str, int]:
    """Bytes by part, without what a sharding strategy gathers of a layer at a time.

    Activations: 34 bytes per token, layer and hidden unit in 16 bits, 4 in a layer that is recomputed, 24 in
    one that keeps its products and attention (6 for queries, keys and values, 2 for attention and 2 for its
    projection, 8 and 2 in the MLP, 4 as above). The rule is that of Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", section 4, without its attention-score term: the
    scores are never kept.
    """
    compute = FP32 if job.train.mixed_precision == "fp32" else BF16
    tokens = plan.micro_batch_tokens
    strategy, sharded = job.strategy, 3 if job.strategy.name == "fsdp" else job.strategy.stage or 0
    stepped = state_bytes(sizes.model, job.train)
    if strategy.name == "zero":
        stepped += sizes.trainable * FP32  # DeepSpeed steps a copy of the weights
    host = "_in_host_memory" if strategy.offload == "cpu" else ""

    def share(n_bytes: int, stage: int) -> int:
        """Of what is sharded from this stage on."""
        return math.ceil(n_bytes / plan.world_size) if sharded >= stage else n_bytes

    parts = {
        f"weights{host if sharded == 3 else ''}": share(sizes.weight_bytes, 3),
        "gradients": share(sizes.trainable * FP32, 2),
        f"optimizer{host}": share(stepped, 1),
        "activations": tokens * sizes.hidden * compute * kept_values(job.train, sizes.layers),
        "logits": 2 * rows_at_once(tokens, sizes.vocabulary) * sizes.vocabulary * FP32,
    }
    return {**parts, "total": sum(parts.values())}


def kept_values(train: Train, layers: int) -> int:
    """Activations kept for the backward pass, per token and hidden unit, in all layers."""
    whole, recomputed, selective = 34 // 2, 4 // 2, 24 // 2
    which = train.gradient_checkpointing
    if which == "selective":
        return layers * selective
    if isinstance(which, bool):
        return layers * (recomputed if which else whole)
    n = math.ceil(layers / which)
    return n * recomputed + (layers - n) * whole


def _disk(job: Job, sizes: Sizes, tokens: int) -> dict[str, int]:
    kept = job.checkpoint.save_total_limit + 2  # the best one, and the one being written
    parts = {
        "token_log": tokens * (2 if sizes.vocabulary <= 2**16 else 4),
        "checkpoints": kept * (sizes.trainable * FP32 + state_bytes(sizes.model, job.train)),
        "model": sizes.total * FP32,
    }
    return {**parts, "total": sum(parts.values())}
