"""`micro_batch_size: auto` on a GPU: the largest that fits, found by trying before the first step.

    the estimate ─▶ start ─▶ forward and backward ─┬─ fits: a size up, until one does not fit
                                                   └─ does not fit: a size down, until one does

A try is a micro batch of padding, which has no weight: its gradients are zero, wherever they are kept.

Plain DDP goes on after a try that ran out of memory. FSDP2 cannot, nor can ranks that wait within a pass: the
attempt ends then, and the next one takes half. So their tries begin at half of what fits by the estimate, and
only sizes follow that fit by what was measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from raydist.job.plan import Plan, make_plan
from raydist.job.schema import Job
from raydist.model.loss import to_device
from raydist.parallel.ddp import Ddp
from raydist.training.memory import ran_out
from raydist.training.room import HEADROOM, Room

if TYPE_CHECKING:
    from raydist.training.loop import Attempt

WHY_NOT = {"zero": "DeepSpeed is made for a number of micro batches, and counts them"}
"""By strategy, why nothing is tried. Micro batches begin at a constant then; later attempts halve it."""


# --- the search


def sizes_up_to(most: int) -> list[int]:
    """most, its half, quarter, ... 1, each rounded up: a worker's share in equal parts, so of one shape."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def largest_that_fits(fits: Callable[[int], bool], start: int, most: int) -> int | None:
    """The largest of `sizes_up_to(most)` that fits, or None. No size is asked for twice.

    fits: whether a size fits; where one does, all smaller ones do.  start: the first that is tried is the
    largest size up to it.
    """
    sizes = sizes_up_to(most)
    at = next(index for index, size in enumerate(sizes) if size <= max(start, 1))
    if not fits(sizes[at]):
        return next((size for size in sizes[at + 1 :] if fits(size)), None)
    while at > 0 and fits(sizes[at - 1]):
        at -= 1
    return sizes[at]


# --- a try


class Memory(Protocol):
    """A device's memory. available: bytes for this process at most."""

    available: int

    def in_use(self) -> int:
        """Bytes that are allocated now."""

    def peak_of(self, run: Callable[[], None]) -> int:
        """Bytes allocated at most during `run`. What it raises for want of memory is raised here."""

    def empty(self) -> None:
        """Give back what is not in use, and forget the peak."""


class GpuMemory:
    """available: what is free on the device, and what this process holds of it already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak_of(self, run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def empty(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass
class Tries:
    """Tries micro batches, on all ranks alike.

    run: a forward and a backward pass of so many sequences.  later: gives the bytes that are not allocated
    yet and will be in every step: gradients, the optimizer's state.  on_all: whether something is so on every
    rank.  survives: whether a try may run out of memory.  peaks: this rank's bytes by size of what was tried,
    `later` included; None where memory ran out.
    """

    run: Callable[[int], None]
    memory: Memory
    later: Callable[[], int]
    on_all: Callable[[bool], bool] = bool
    survives: bool = True
    peaks: dict[int, int | None] = field(default_factory=dict)

    @property
    def planned(self) -> float:
        """Bytes to plan with."""
        return HEADROOM * self.memory.available

    def fits(self, size: int) -> bool:
        """With room to spare, but for one sequence, below which there is nothing.

        A size that cannot fit by what a smaller one took is not tried: compiling may take half a minute.
        Raises what a try raised for want of memory if it does not survive that.
        """
        most = self.memory.available if self.survives else self.planned
        if not self.on_all(self._expected(size) <= most):
            return False
        self.peaks[size] = peak = self._peak_of(size)
        limit = self.planned if size > 1 else self.memory.available
        return self.on_all(peak is not None and peak <= limit)

    def _peak_of(self, size: int) -> int | None:
        later = self.later()
        peak: int | None = None
        try:
            peak = self.memory.peak_of(lambda: self.run(size)) + later
        except (RuntimeError, MemoryError) as error:
            if not (self.survives and ran_out(error)):
                raise
        if peak is None:
            gc.collect()  # what an interrupted pass leaves is held together by cycles
        self.memory.empty()
        return peak

    def _expected(self, size: int) -> float:
        """Bytes, in proportion to the largest size that was tried; 0 before that and for smaller ones."""
        tried = max((of for of, peak in self.peaks.items() if peak is not None), default=size)
        peak, at_rest = self.peaks.get(tried), self.memory.in_use() + self.later()
        return 0.0 if peak is None or size <= tried else at_rest + (peak - at_rest) * size / tried


# --- in an attempt


@dataclass(frozen=True)
class Found:
    """What the search gave. tokens: of the largest micro batch; None where nothing was tried, and why_not.

    peaks: by sequences of block_size tokens, as in `Tries` on this rank.
    """

    tokens: int | None = None
    block_size: int = 0
    peaks: dict[int, int | None] = field(default_factory=dict)
    available: int = 0
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the record of an attempt's start."""
        if self.tokens is None:
            return {"micro_batch_not_tried": self.why_not}
        return {
            "micro_batch_tokens": self.tokens,
            "micro_batches_tried": [
                {"sequences": n, "block_size": self.block_size, "bytes": peak}
                for n, peak in self.peaks.items()
            ],
            "device_bytes": self.available,
        }


def find_micro_batch(attempt: Attempt, room: Room, memory: Memory | None = None) -> None:
    """Collective. Gives an attempt that is to find its micro batches, before its first step, a plan with the
    largest that fit on every rank. The global batch stays.

    memory: of this rank's device; by default a GPU's, and on a CPU nothing is tried. Raises OutOfMemory where
    not even one sequence fits.
    """
    device, name = attempt.world.device, attempt.job.strategy.name
    if not attempt.spec.find_micro_batch or attempt.resumed or (memory is None and device.type != "cuda"):
        return
    if name in WHY_NOT:
        attempt.micro_batch_found = Found(why_not=WHY_NOT[name])
        return
    memory = memory or GpuMemory(device)
    with attempt.phases.during("probe"), torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = _search(attempt, room, memory)
    attempt.micro_batch_found = found
    attempt.plan = room.plan = _plan_of(attempt.job, attempt.plan, found.tokens or 1)


def _search(attempt: Attempt, room: Room, memory: Memory) -> Found:
    job, plan, world = attempt.job, attempt.plan, attempt.world
    block_size = max(job.block_sizes)  # the other stages have as many tokens at most, in shorter rows
    most = max(-(-s.global_batch_size // world.world_size) for s in plan.stages if s.block_size == block_size)
    parts, before = room.parts(plan), memory.in_use()

    def run(n: int) -> None:
        room.plan = _plan_of(job, plan, n * block_size)
        attempt.record("try", micro_batch_tokens=n * block_size)  # the next attempt reads it if this one ends
        _pass(attempt, n)

    def later() -> int:
        """Gradients are there after the first pass, or were from the beginning."""
        missing = parts.get("gradients", 0) - (memory.in_use() - before)
        return parts.get("optimizer", 0) + max(missing, 0)

    tries = Tries(run, memory, later, world.all, survives=isinstance(attempt.strategy, Ddp))
    foreseen = tries.planned if tries.survives else tries.planned / 2

    def fits_by_the_estimate(n: int) -> bool:
        return room.needed(_plan_of(job, plan, n * block_size)) <= foreseen

    start = next(filter(fits_by_the_estimate, sizes_up_to(most)), 1) if world.is_main else 0
    size = largest_that_fits(tries.fits, world.from_main(start), most)
    if size is None:
        tried = f"one sequence of {block_size} tokens was tried, and does not fit on every worker"
        raise room.out_of_memory(torch.OutOfMemoryError(tried))
    return Found(size * block_size, block_size, tries.peaks, memory.available)


def _plan_of(job: Job, plan: Plan, tokens: int) -> Plan:
    """`plan` with micro batches of so many tokens."""
    return make_plan(job, plan.world_size, plan.samples_per_epoch, tokens)


def _pass(attempt: Attempt, n: int) -> None:
    """Forward and backward pass of n sequences of the longest block, of two documents each, as padding."""
    feed = attempt.data.feed
    blocks = max((stage.blocks for stage in feed.stages), key=lambda blocks: blocks.block_size)
    batch = blocks.empty(np.full(n, -1))
    half, size = blocks.block_size // 2, blocks.block_size
    # all tokens in turn, which a mixture of experts spreads as it does real ones
    batch["input_ids"][:] = np.arange(n * size).reshape(n, size) % feed.sources[0].log.vocab_size
    if blocks.document_mask:
        batch["document_lengths"][:, :2] = half, size - half
        batch["position_ids"][:, half:] -= half
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors = tensors if attempt.collate is None else attempt.collate(tensors)
    attempt.strategy.forward_backward(to_device(tensors, attempt.world.device), 1, last=False)
