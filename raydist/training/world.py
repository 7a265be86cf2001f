"""This process among the ranks of a training run, and the few sums they take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from raydist.errors import WorkerLost


@dataclass(frozen=True)
class World:
    """With one rank no process group is needed; with more the caller has made the default group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Element by element over all ranks, exact."""
        total = self.sum_(torch.tensor(values, dtype=torch.int64, device=self.device))
        return [int(value) for value in total.tolist()]

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in fp64."""
        total = self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device))
        return [float(value) for value in total.tolist()]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place. Raises WorkerLost when the other ranks cannot be reached."""
        if self.world_size > 1:
            try:
                dist.all_reduce(tensor)
            except (dist.DistError, RuntimeError) as error:
                raise WorkerLost(
                    f"rank {self.rank} lost contact with the other ranks",
                    why=str(error).strip().splitlines()[0],
                    fix="the run goes on from its last checkpoint when it is submitted again",
                ) from error
        return tensor

    def from_main(self, value: int) -> int:
        """Rank 0's value, on every rank. Also a barrier."""
        return self.sum_ints([value if self.is_main else 0])[0]
