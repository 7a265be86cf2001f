"""What a job would cost, from a sample of its files and its model's configuration. Starts nothing."""

from __future__ import annotations

from typing import Any

import torch

from raydist.corpus.build import estimate, plan_log
from raydist.corpus.tokenizer import TokenizerSpec, planned_tokenizer
from raydist.job.plan import Plan, make_plan
from raydist.job.schema import Job
from raydist.job.search import trial_at
from raydist.model.build import (
    Sizes,
    check_base,
    check_fits,
    check_tokenizer,
    check_vocabulary,
    load_config,
    model_sizes,
)
from raydist.parallel.footprint import FP32, worker_memory
from raydist.parallel.optimizer import state_bytes
from raydist.run.attempts import first_micro_batch_tokens, remembered
from raydist.run.dataset import document_begin
from raydist.run.lifecycle import folder_of
from raydist.storage import Storage
from raydist.track.listener import Listener
from raydist.training.micro_batch import WHY_NOT

BYTES_PER_TOKEN_OF_NEW_BPE = 3.0
"""Assumed for a tokenizer that the job has yet to train; measured on a log once there is one."""


def plan_sweep(job: Job, listener: Listener | None = None) -> dict[str, Any]:
    """The number of trials, and the plans of two: with the first and the last value of every searched key."""
    assert job.tune is not None
    first, last = (plan_job(trial_at(job, end), listener) for end in (0, -1))
    each = [_tokens(first["steps"]), _tokens(last["steps"])]
    most = job.tune.n_trials * max(each)
    return {
        "name": job.name,
        "trials": job.tune.n_trials,
        "tokens_at_most": round(most if job.tune.max_tokens is None else min(most, job.tune.max_tokens)),
        "searched": {key: of.extremes for key, of in job.tune.search.items()},
        "first": first,
        "last": last,
    }


def _tokens(steps: dict[str, Any]) -> int:
    return sum(stage["steps"] * stage["tokens_per_step"] for stage in steps["stages"])


def plan_job(job: Job, listener: Listener | None = None, *, measured: bool = False) -> dict[str, Any]:
    """Data, steps, parameters, memory per worker by part and disk, all in bytes or counts.

    Of a range of workers with the most; `least` has what differs with the least.

    measured: two steps are made here, for the time that the run takes and the memory of a worker.
    """
    listener = listener or Listener()
    storage = Storage(job.storage).resolve()
    tokenizer = planned_tokenizer(job, storage)
    sources = {}
    for name in job.corpus.sources:
        listener.phase("reading a sample", name)
        sources[name] = _source(job, name, tokenizer, storage)
    tokens = sum(source["tokens"] for source in sources.values()) * (1 - job.corpus.holdout)
    documents = sum(source["documents"] for source in sources.values())
    bos = document_begin(job, tokenizer, folder_of(job).data().get("pins")) if tokenizer else None
    around = job.packing.add_eos_token + (bos is not None or job.packing.add_bos_token is True)
    blocks = max(1, round((tokens + documents * around) / job.block_sizes[0]))
    weighted = any(weight is not None for weight in job.corpus.weights.values())
    known = None if weighted or job.stages else blocks
    listener.phase("counting the model")
    on_gpus = job.scaling.on_gpus(torch.cuda.device_count())
    device_type = "cuda" if on_gpus else "cpu"
    scaling, folder = job.scaling, folder_of(job)
    found = remembered(job, folder, device_type, scaling.most)
    micro = found or first_micro_batch_tokens(device_type)
    plan = make_plan(job, scaling.most, known, micro)
    _add_epochs(sources, job, plan, around)
    config = load_config(job, tokenizer.vocab_size if tokenizer else _new_vocabulary(job))
    check_fits(config, job)
    if job.model.base is not None:
        check_base(job)
        check_tokenizer(job)
    sizes = model_sizes(config, job, tokenizer.vocab_size if tokenizer else 0)
    if tokenizer is not None:
        check_vocabulary(sizes.vocabulary, tokenizer.vocab_size)
    steps_here = {}
    if measured:
        from raydist.run.calibrate import measure

        steps_here = {"measured": measure(job, plan, listener)}
    return {
        "name": job.name,
        **steps_here,
        "data": {
            "sources": sources,
            "blocks": blocks,
            "tokenizer": "to be trained" if tokenizer is None else "ready",
            "begins_with": tokenizer.token(bos) if tokenizer and bos is not None else None,
        },
        "steps": {**_steps(plan), "micro_batch_from": micro_batch_from(job, found)},
        "parameters": {
            "total": sizes.total,
            "trainable": sizes.trainable,
            "frozen": sizes.frozen,
            "without_adapter": sizes.without_adapter,
        },
        "memory_per_worker_bytes": worker_memory(job, plan, sizes, on_cpu=not on_gpus),
        **({"least": _least(job, plan, sizes, device_type)} if scaling.elastic else {}),
        "disk_bytes": _disk(job, sizes, int(tokens), getattr(config.dtype, "itemsize", FP32)),
    }


def _least(job: Job, plan: Plan, sizes: Sizes, device_type: str) -> dict[str, Any]:
    """The same with the least workers of a range, as far as it differs. plan: with the most."""
    workers = job.scaling.least
    tokens = remembered(job, folder_of(job), device_type, workers) or first_micro_batch_tokens(device_type)
    least = make_plan(job, workers, plan.samples_per_epoch, tokens)
    return {
        "workers": workers,
        "micro_batch_size": least.micro_batch_size,
        "accumulation_steps": least.accumulation_steps,
        "memory_per_worker_bytes": worker_memory(job, least, sizes, on_cpu=device_type == "cpu"),
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
        "left_out": plan.source.left_out,
        "log": "complete" if tokenizer and plan.complete else "to be made",
    }


def _add_epochs(sources: dict[str, Any], job: Job, plan: Plan, around: int) -> None:
    """How often the run passes over each source: its share of the samples, by its tokens to train on.

    around: the tokens that are added to each document.
    """
    kept = 1 - job.corpus.holdout
    left = {
        name: source["tokens"] * kept + source["documents"] * kept * around
        for name, source in sources.items()
    }
    read = sum(stage.samples * stage.block_size for stage in plan.stages)
    for name, source in sources.items():
        weight = job.corpus.weights[name]
        share = left[name] / max(1, sum(left.values())) if weight is None else weight
        source["epochs"] = read * share / max(1, left[name])


def _steps(plan: Plan) -> dict[str, Any]:
    return {
        "optimizer_steps": plan.steps,
        "samples": plan.samples,
        "tokens_per_step": plan.tokens_per_step,
        "stages": [
            {"block_size": stage.block_size, "steps": stage.steps, "tokens_per_step": stage.tokens_per_step}
            for stage in plan.stages
        ],
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


def _disk(job: Job, sizes: Sizes, tokens: int, itemsize: int) -> dict[str, int]:
    """itemsize: bytes of a weight of the base, in whose dtype model/ is written; an adapter is in fp32."""
    kept = job.checkpoint.save_total_limit + 2  # the best one, and the one being written
    parts = {
        "token_log": tokens * (2 if sizes.vocabulary <= 2**16 else 4),
        "checkpoints": kept * (sizes.trainable * FP32 + state_bytes(sizes.model, job.train)),
        "model": sizes.trainable * FP32
        if job.adapter
        else sizes.total * (itemsize if job.model.base else FP32),
    }
    return {**parts, "total": sum(parts.values())}
