"""What a job becomes on a cluster of a given size: steps, samples, micro batches. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydist.errors import JobError
from raydist.job.schema import Job

CPU_MICRO_BATCH_TOKENS = 4096
"""`micro_batch_size: auto` on CPU: big enough to keep a core busy, small enough for its caches and 8 GB."""

DEFAULT_GLOBAL_BATCH_SIZE = 32


@dataclass(frozen=True)
class Plan:
    """world_size in workers; steps in optimizer steps; samples in blocks of block_size tokens.

    `samples` is where the run ends: the last step is short when it is not a multiple of the batch.
    """

    world_size: int
    micro_batch_size: int
    global_batch_size: int
    block_size: int
    steps: int
    samples: int

    @property
    def accumulation_steps(self) -> int:
        """Micro batches per step and worker; the last may be padded with samples of weight zero."""
        return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.micro_batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.block_size


def make_plan(job: Job, world_size: int, samples_per_epoch: int | None) -> Plan:
    """`samples_per_epoch`: blocks in one pass over the corpus; None for a weighted mixture."""
    batch, block = samples_per_step(job), job.packing.block_size
    if job.train.epochs is not None:
        if samples_per_epoch is None:
            raise JobError(
                "train.epochs needs a corpus without weights", fix="give train.max_steps or max_tokens"
            )
        samples = job.train.epochs * samples_per_epoch
    elif job.train.max_tokens is not None:
        samples = math.ceil(job.train.max_tokens / (batch * block)) * batch
    else:
        assert job.train.max_steps is not None  # the schema gives exactly one of the three
        samples = job.train.max_steps * batch
    return Plan(
        world_size,
        _micro_batch_size(job, world_size, batch),
        batch,
        block,
        math.ceil(samples / batch),
        samples,
    )


def samples_per_step(job: Job) -> int:
    """Sequences per optimizer step."""
    tokens = job.train.global_batch_tokens
    if tokens is not None:
        return tokens // job.packing.block_size
    return job.train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE


def _micro_batch_size(job: Job, world_size: int, global_batch_size: int) -> int:
    per_worker = math.ceil(global_batch_size / world_size)
    asked = job.train.micro_batch_size
    wanted = max(1, CPU_MICRO_BATCH_TOKENS // job.packing.block_size) if asked == "auto" else asked
    return min(wanted, per_worker)
