"""From a job to a model that is spread over the ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from raydist.errors import JobError
from raydist.job.rules import NOT_SHARDED
from raydist.job.schema import Job
from raydist.model.attention.choose import NAMES, Chosen, use_attention
from raydist.model.build import Fitted, build_model, fit_model, take_fitted
from raydist.model.compiled import why_not_compiled
from raydist.model.head import Head
from raydist.parallel.strategy import Strategy
from raydist.parallel.world import World


def build_on_ranks(job: Job, tokenizer_folder: Path, world: World) -> nn.Module:
    """Collective: `build_model`, the same model on every rank.

    Where the strategy shards weights, rank 0 has the model on its CPU and the others have it on meta, without
    weights. Only rank 0 can try the model then; the others take what it found. A quantized base
    is read by every rank, which quantizes it on its own device.
    """
    if not job.strategy.shards_weights or job.quantization is not None:
        return build_model(job, tokenizer_folder, world.device)

    def fit(model: nn.Module) -> None:
        fitted = fit_model(model, job, world.device) if world.is_main else None
        name = NAMES[world.from_main(NAMES.index(fitted.attention.name) if fitted else 0)]
        masked = bool(world.from_main(int(fitted.attention.masked) if fitted else 0))
        head = _head_from_main(fitted.head if fitted else None, world)
        if fitted is None:
            uncompiled = why_not_compiled(job.train.compile, world.device, job.strategy.name)
            use_attention(model, name, masked=masked)
            take_fitted(model, Fitted(Chosen(name, masked), head, uncompiled))

    place = torch.device("cpu" if world.is_main else "meta")
    return build_model(job, tokenizer_folder, world.device, place=place, fit=fit)


def _head_from_main(head: Head | None, world: World) -> Head | None:
    found = [head is not None, head.scale if head else 0.0, head.cap if head else 0.0]
    there, scale, cap = world.sum_floats([float(value) for value in found])
    return Head(scale, cap) if there else None


def make_strategy(model: nn.Module, job: Job, world: World, accumulation_steps: int) -> Strategy:
    """accumulation_steps: micro batches per step and rank."""
    if world.device.type not in ("cpu", "cuda"):
        raise JobError(
            f"no strategy for {world.device.type} devices", fix="train on CPU or on NVIDIA or AMD GPUs"
        )
    if job.strategy.name == "fsdp":
        from raydist.parallel.fsdp import Fsdp

        return Fsdp(model, job, world)
    if job.strategy.name == "zero":
        from raydist.parallel.zero import Zero

        return Zero(model, job, world, accumulation_steps)
    if world.device.type == "cpu":
        from raydist.parallel.ddp import DdpOnCpu

        return DdpOnCpu(model, job, world)
    if keeps_16_bits(job):
        from raydist.parallel.fsdp import Replicated

        return Replicated(model, job, world)
    from raydist.parallel.ddp import DdpOnGpu

    return DdpOnGpu(model, job, world)


def keeps_16_bits(job: Job) -> bool:
    """Whether ddp on GPUs casts a layer's weights together; under autocast they are cast where they are used.

    A frozen base is in 16 bits already. The optimizer must take FSDP2's kind of weights.
    """
    whole = job.adapter is None and job.train.mixed_precision != "fp32"
    return whole and (job.train.optimizer.name, "fsdp") not in NOT_SHARDED
