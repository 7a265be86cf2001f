"""What a job becomes on a cluster of a given size: steps, samples, micro batches. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from raydist.errors import JobError
from raydist.job.rules import DEFAULT_GLOBAL_BATCH_SIZE
from raydist.job.schema import Job

CPU_MICRO_BATCH_TOKENS = 4096
"""`micro_batch_size: auto` on CPU: enough to keep a core busy, and it fits its caches and 8 GB of memory."""
GPU_MICRO_BATCH_TOKENS = 65_536
"""The same on a GPU where nothing is tried: enough to keep it busy, and halved when memory runs out."""


class Stretch(NamedTuple):
    """samples, in blocks of block_size tokens."""

    block_size: int
    samples: int


class Mix(NamedTuple):
    """The share of each source from sample `start` of the run on; None for all: they are read as one."""

    start: int
    weights: dict[str, float | None]


@dataclass(frozen=True)
class StagePlan:
    """samples, in blocks of block_size tokens. The last step is short if they do not fill the batch."""

    block_size: int
    samples: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def steps(self) -> int:
        return math.ceil(self.samples / self.global_batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.block_size


class SegmentPlan(NamedTuple):
    """steps, from first_step on, which counts from 0.

    rewarm: they have a learning rate schedule of their own.  reset: the optimizer begins again.
    """

    first_step: int
    steps: int
    rewarm: bool = True
    reset: bool = False


@dataclass(frozen=True)
class Plan:
    """world_size: workers.  stages: in order, most often one.  extensions: after the first segment.

    Properties that belong to a single stage, such as block_size, describe stage 0.
    """

    world_size: int
    stages: tuple[StagePlan, ...]
    samples_per_epoch: int | None = None
    extensions: tuple[SegmentPlan, ...] = ()

    @property
    def segments(self) -> tuple[SegmentPlan, ...]:
        """All of the run, in order: the first one, and its extensions."""
        first = self.extensions[0].first_step if self.extensions else self.steps
        return SegmentPlan(0, first), *self.extensions

    def segment(self, step: int) -> SegmentPlan:
        """That of the run's step, which counts from 0."""
        return next(each for each in reversed(self.segments) if each.first_step <= step)

    @property
    def starts(self) -> set[int]:
        """The first step of each segment."""
        return {each.first_step for each in self.segments}

    @property
    def batch_sizes(self) -> list[int] | int:
        """Sequences of a step, for each stage of the feed: all stages of an extended run have the same."""
        sizes = [stage.global_batch_size for stage in self.stages]
        return sizes if len(sizes) > 1 else sizes[0]

    @property
    def micro_batch_sizes(self) -> list[int] | int:
        """The same of a micro batch."""
        sizes = [stage.micro_batch_size for stage in self.stages]
        return sizes if len(sizes) > 1 else sizes[0]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return sum(stage.samples for stage in self.stages)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest forward pass of a worker."""
        return max(stage.micro_batch_size * stage.block_size for stage in self.stages)

    @property
    def block_size(self) -> int:
        return self.stages[0].block_size

    @property
    def global_batch_size(self) -> int:
        return self.stages[0].global_batch_size

    @property
    def micro_batch_size(self) -> int:
        return self.stages[0].micro_batch_size

    @property
    def micro_batches(self) -> str:
        """Micro batch size of each stage, in sequences, as text: `8, then 4`."""
        return ", then ".join(str(stage.micro_batch_size) for stage in self.stages)

    @property
    def accumulation_steps(self) -> int:
        """Micro batches per step and worker; the last may be padded with samples of weight zero."""
        return math.ceil(math.ceil(self.global_batch_size / self.world_size) / self.micro_batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.stages[0].tokens_per_step


def make_plan(
    job: Job,
    world_size: int,
    samples_per_epoch: int | None,
    micro_batch_tokens: int = CPU_MICRO_BATCH_TOKENS,
) -> Plan:
    """`samples_per_epoch`: blocks in one pass over the corpus; None for a weighted mixture and for stages.

    micro_batch_tokens: what `micro_batch_size: auto` means, rounded down to whole sequences, at least one.
    """
    extensions = _extensions(job) if job.train.extend else ()
    more = sum(each.steps for each in extensions) * samples_per_step(job, job.packing.block_size)
    return Plan(
        world_size,
        tuple(
            StagePlan(
                stretch.block_size,
                stretch.samples + more,
                samples_per_step(job, stretch.block_size),
                _micro_batch_size(job, world_size, stretch.block_size, micro_batch_tokens),
            )
            for stretch in (stretches(job) if job.stages else [_stretch(job, samples_per_epoch)])
        ),
        samples_per_epoch,
        extensions,
    )


def _extensions(job: Job) -> tuple[SegmentPlan, ...]:
    block = job.packing.block_size
    batch, found = samples_per_step(job, block), list[SegmentPlan]()
    first = _stretch(job, None).samples // batch
    for each in job.train.extend:
        steps = _stretch_of_tokens(job, block, each.max_tokens).samples // batch
        found.append(SegmentPlan(first, steps, each.rewarm, each.optimizer == "reset"))
        first += steps
    return tuple(found)


def stretches(job: Job) -> list[Stretch]:
    """The stages of a job, each rounded up to whole steps."""
    return [_stretch_of_tokens(job, stage.block_size, stage.max_tokens) for stage in job.stages]


def _stretch(job: Job, samples_per_epoch: int | None) -> Stretch:
    block = job.packing.block_size
    if job.train.epochs is not None:
        if samples_per_epoch is None:
            raise JobError(
                "train.epochs needs a corpus without weights", fix="give train.max_steps or max_tokens"
            )
        return Stretch(block, job.train.epochs * samples_per_epoch)
    if job.train.max_tokens is not None:
        return _stretch_of_tokens(job, block, job.train.max_tokens)
    assert job.train.max_steps is not None  # the schema gives exactly one of the three
    return Stretch(block, job.train.max_steps * samples_per_step(job, block))


def _stretch_of_tokens(job: Job, block_size: int, max_tokens: float) -> Stretch:
    batch = samples_per_step(job, block_size)
    return Stretch(block_size, math.ceil(max_tokens / (batch * block_size)) * batch)


def samples_per_step(job: Job, block_size: int) -> int:
    """Sequences per optimizer step."""
    tokens = job.train.global_batch_tokens
    if tokens is not None:
        return tokens // block_size
    return job.train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE


def sized(job: Job, workers: int) -> Job:
    """The job with that number of workers, where it leaves a range; else the job itself."""
    if not job.scaling.elastic:
        return job
    fixed = {"num_workers": workers, "grow_after": "auto"}
    return job.model_copy(update={"scaling": job.scaling.model_copy(update=fixed)})


def tokens_after(job: Job, steps: int) -> int:
    """Input tokens of the first `steps` steps, including padding."""
    tokens = 0
    for size, samples in stretches(job)[:-1]:
        taken = min(steps, samples // samples_per_step(job, size))
        tokens, steps = tokens + taken * samples_per_step(job, size) * size, steps - taken
    size = job.block_sizes[-1]
    return tokens + steps * samples_per_step(job, size) * size


def _micro_batch_size(job: Job, world_size: int, block_size: int, tokens: int) -> int:
    per_worker = math.ceil(samples_per_step(job, block_size) / world_size)
    asked = job.train.micro_batch_size
    wanted = max(1, tokens // block_size) if asked == "auto" else asked
    return min(wanted, per_worker)
