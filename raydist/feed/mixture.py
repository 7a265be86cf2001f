"""The source that each sample of a weighted mixture comes from.

Weights are multiples of 2**-16, so the choice repeats after 2**16 samples, and one period is a table.
Tijdeman's rule ("The chairman assignment problem", 1980) keeps every source within
1 - 1/(2k - 2) samples of its share at every g, for k sources: the best that any rule can do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from raydist.corpus.log import Ints
from raydist.errors import JobError

PERIOD = 1 << 16


def round_weights(weights: Sequence[float]) -> list[int]:
    """Shares of PERIOD that add up to it, by largest remainder. Raises JobError for a share below one."""
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) * PERIOD / total for weight in weights]
    units = [int(share) for share in exact]
    by_remainder = sorted(range(len(units)), key=lambda source: (units[source] - exact[source], source))
    for source in by_remainder[: PERIOD - sum(units)]:
        units[source] += 1
    if 0 in units:
        weight = weights[units.index(0)]
        raise JobError(
            f"weight {weight:g} is less than 2^-16 of the mixture",
            where="corpus.sources",
            why="no sample would ever come from that source",
            fix="raise the weight or leave the source out",
        )
    return units


def tabulate(units: Sequence[int]) -> NDArray[np.uint16]:
    """Source of each sample of one period, uint16 [PERIOD].

    The j-th sample of a source (from 0) may not come before the source's share reaches j + 1/d, and has to
    come before that share passes j + 1 - 1/d, where d = 2k - 2. Among the samples that may come, the one with
    the earliest deadline does.
    """
    if len(units) == 1:
        return np.zeros(PERIOD, np.uint16)
    d = 2 * len(units) - 2
    waiting = [(_release(0, unit, d), source, 0) for source, unit in enumerate(units)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    table = np.empty(PERIOD, np.uint16)
    for time in range(1, PERIOD + 1):
        while waiting and waiting[0][0] <= time:
            _, source, j = heapq.heappop(waiting)
            heapq.heappush(ready, (_due(j, units[source], d), source, j))
        _, source, j = heapq.heappop(ready)
        table[time - 1] = source
        heapq.heappush(waiting, (_release(j + 1, units[source], d), source, j + 1))
    return table


def _release(j: int, unit: int, d: int) -> int:
    """First time t at which t * unit / PERIOD >= j + 1/d."""
    return -(-PERIOD * (d * j + 1) // (d * unit))


def _due(j: int, unit: int, d: int) -> int:
    """First time t at which t * unit / PERIOD > j + 1 - 1/d."""
    return PERIOD * (d * (j + 1) - 1) // (d * unit) + 1


class Mixture:
    """Maps samples of a stage to (source, position in that source's stream), in O(1)."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.units = np.array(round_weights(weights), np.int64)
        self.table = tabulate(self.units.tolist())
        self._earlier = np.empty(PERIOD, np.int64)  # samples of the same source earlier in the period
        for source, unit in enumerate(self.units):
            self._earlier[self.table == source] = np.arange(unit)

    def locate(self, samples: Ints) -> tuple[Ints, Ints]:
        """The source of each sample, and its position in the source's stream."""
        period, within = np.divmod(samples, PERIOD)
        sources = self.table[within].astype(np.int64)
        return sources, period * self.units[sources] + self._earlier[within]

    def before(self, n_samples: int) -> Ints:
        """Samples of each source among the first n_samples."""
        period, within = divmod(n_samples, PERIOD)
        return period * self.units + np.bincount(self.table[:within], minlength=len(self.units))
