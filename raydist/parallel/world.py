"""This process among the ranks of a training run, and the few sums they take together."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from raydist.errors import WorkerLost

T = TypeVar("T")


def backend_of(device: torch.device) -> str:
    """GPU runs also need gloo: what the hosts agree on stays on the CPU, and weights are shared there."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def contact(rank: int) -> Iterator[None]:
    """Raises WorkerLost where a collective fails because the other ranks cannot be reached.

    Sharding strategies communicate within the model's own passes, and gloo reports a lost connection as a
    plain RuntimeError. So an error counts as lost contact by where it was raised.
    """
    try:
        yield
    except RuntimeError as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if not isinstance(error, dist.DistError) and not any(
            frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d" for frame in frames
        ):
            raise
        raise WorkerLost(
            f"rank {rank} lost contact with the other ranks",
            why=str(error).strip().splitlines()[0],
            fix="the run goes on from its last checkpoint when it is submitted again",
        ) from error


@dataclass(frozen=True)
class World:
    """This rank. One rank alone needs no process group; for more, the caller has made the default group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def ensure_group(self) -> None:
        """Make a process group of one, for libraries that require a group."""
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend_of(self.device), store=store, rank=0, world_size=1)

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums over all ranks, exact. On the hosts: no GPU is waited for."""
        total = self.sum_(torch.tensor(values, dtype=torch.int64, device="cpu"))
        return [int(value) for value in total.tolist()]

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in fp64. On the hosts: no GPU is waited for."""
        total = self.sum_(torch.tensor(values, dtype=torch.float64, device="cpu"))
        return [float(value) for value in total.tolist()]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        return self.sum_ints([value if self.is_main else 0])[0]

    def float_from_main(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        return self.sum_floats([value if self.is_main else 0.0])[0]

    def all(self, here: bool) -> bool:
        """Whether `here` is true on every rank."""
        return self.sum_ints([not here]) == [0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank. On the hosts; pickled."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Returns once every rank is here."""
        if self.world_size > 1:
            dist.barrier()
