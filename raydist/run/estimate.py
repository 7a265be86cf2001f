"""What a job would cost, from a sample of its files and its model's configuration. Starts nothing."""

from __future__ import annotations

from typing import Any

from raydist.corpus.build import estimate, plan_log
from raydist.corpus.tokenizer import TokenizerSpec, planned_tokenizer
from raydist.job.plan import Plan, make_plan
from raydist.job.schema import Job
from raydist.model.build import Sizes, check_fits, load_config, model_sizes
from raydist.parallel.footprint import FP32, worker_memory
from raydist.parallel.optimizer import state_bytes
from raydist.run.attempts import first_micro_batch_tokens, remembered
from raydist.run.lifecycle import folder_of
from raydist.storage import Storage
from raydist.training.micro_batch import WHY_NOT

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
    device_type = "cuda" if job.scaling.use_gpu is True else "cpu"
    found = remembered(folder_of(job), device_type)
    micro = found or first_micro_batch_tokens(device_type)
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
        "steps": {**_steps(plan), "micro_batch_from": micro_batch_from(job, found)},
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


def micro_batch_from(job: Job, found: int | None) -> str:
    """Where the micro batch size that the plan shows comes from."""
    if job.train.micro_batch_size != "auto":
        return "job"
    if found:
        return "earlier attempts"
    tries = job.strategy.name not in WHY_NOT and job.scaling.use_gpu is not False
    return "first guess" if tries else "first guess, halved if memory runs out"


def _disk(job: Job, sizes: Sizes, tokens: int) -> dict[str, int]:
    kept = job.checkpoint.save_total_limit + 2  # the best one, and the one being written
    parts = {
        "token_log": tokens * (2 if sizes.vocabulary <= 2**16 else 4),
        "checkpoints": kept * (sizes.trainable * FP32 + state_bytes(sizes.model, job.train)),
        "model": sizes.total * FP32,
    }
    return {**parts, "total": sum(parts.values())}
