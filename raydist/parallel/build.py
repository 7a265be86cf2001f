"""From a job to a model that is spread over the ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.model.attention import NAMES, use_attention
from raydist.model.build import build_model, choose_attention
from raydist.parallel.strategy import Strategy
from raydist.parallel.world import World


def build_on_ranks(job: Job, tokenizer_folder: Path, world: World) -> nn.Module:
    """Collective: `build_model`, the same model on every rank.

    Where the strategy shards weights, rank 0 has the model on its CPU and the others have it on meta, without
    weights. Only rank 0 can probe the attention then; the others take the one it took. Quantized weights are
    read by every rank, because their scales could not be recognized and sent.
    """
    if not job.strategy.shards_weights or job.quantization is not None:
        return build_model(job, tokenizer_folder, world.device)

    def choose(model: nn.Module) -> None:
        chosen = NAMES.index(choose_attention(model, job, world.device)) if world.is_main else 0
        name = NAMES[world.from_main(chosen)]
        if not world.is_main:
            use_attention(model, name)

    place = torch.device("cpu" if world.is_main else "meta")
    return build_model(job, tokenizer_folder, world.device, place=place, choose=choose)


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
    from raydist.parallel.ddp import DdpOnCpu, DdpOnGpu

    return (DdpOnCpu if world.device.type == "cpu" else DdpOnGpu)(model, job, world)
