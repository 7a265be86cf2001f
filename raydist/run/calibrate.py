"""How long a job will take, and the memory that a worker takes: two steps of one worker, measured here.

The batch is of random tokens in documents as long as a block. Nothing is written, but the tokenizer of a base
that gets new tokens. Other workers, and what they send each other, are not measured: with several of them the
time is what each takes for its own part.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydist.cluster.resources import cpus_per_worker_here
from raydist.corpus.tokenizer import planned_tokenizer, resolve_tokenizer
from raydist.errors import JobError
from raydist.job.plan import Plan, sized
from raydist.job.schema import Job, Strategy
from raydist.model.build import build_model
from raydist.model.loss import to_device
from raydist.parallel.build import make_strategy
from raydist.parallel.world import World
from raydist.storage import Storage
from raydist.track.listener import Listener
from raydist.training.memory import peak_resident

ROUNDS = 3
"""The first one also makes the optimizer's state, and compiles; the fastest of the others counts."""


def measure(job: Job, plan: Plan, listener: Listener | None = None) -> dict[str, Any]:
    """seconds_per_step, seconds of the whole run, memory_bytes at the peak.

    Raises JobError where the job's tokenizer is not trained yet.
    """
    listener = listener or Listener()
    storage = Storage(job.storage).resolve()
    if planned_tokenizer(job, storage) is None:
        raise JobError(
            "there is nothing to measure with yet: the job's tokenizer is still to be trained",
            where="model.tokenizer",
            fix="raydist prepare makes it and the token logs; then measure",
        )
    tokenizer = resolve_tokenizer(job, storage)
    cuda = job.scaling.on_gpus(torch.cuda.device_count())
    world = World(device=torch.device("cuda" if cuda else "cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(cpus_per_worker_here(sized(job, plan.world_size)))
    try:
        listener.phase("loading the model")
        alone = job.model_copy(update={"strategy": Strategy()})
        model = build_model(alone, Path(tokenizer.folder), world.device)
        strategy = make_strategy(model, alone, world, 1)
        forward, update = [], []
        batch = to_device(_batch(plan, model.get_input_embeddings().num_embeddings), world.device)  # type: ignore[operator]
        for done in range(ROUNDS):
            listener.progress("measuring steps", done, ROUNDS)
            began = time.perf_counter()
            strategy.forward_backward(batch, batch["labels"].numel(), last=True)
            _wait(world)
            between = time.perf_counter()
            strategy.update(0.0, job.train.max_grad_norm)
            _wait(world)
            forward.append(between - began)
            update.append(time.perf_counter() - between)
        memory = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    finally:
        torch.set_num_threads(threads)
        gc.collect()
    each = plan.accumulation_steps * min(forward[1:]) + min(update[1:])
    return {"seconds_per_step": each, "seconds": each * plan.steps, "memory_bytes": memory}


def _batch(plan: Plan, vocabulary: int) -> dict[str, Tensor]:
    """A micro batch of the first stage."""
    shape = (plan.micro_batch_size, plan.block_size)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    lengths = torch.zeros(shape, dtype=torch.int32)
    lengths[:, 0] = plan.block_size
    places = torch.arange(plan.block_size).expand(shape)
    return {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": places, "document_lengths": lengths}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
