"""The part of a job that makes it a sweep."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from raydist.job.section import Section

Range = Annotated[tuple[float, float], Field(description="[low, high]")]


class Distribution(Section):
    """What a searched key may be: exactly one of these."""

    loguniform: Range | None = Field(None, description="[low, high]; equal chances per factor")
    uniform: Range | None = Field(None, description="[low, high]")
    choice: list[Any] | None = Field(None, min_length=1, description="values, drawn with equal chances")
    grid: list[Any] | None = Field(None, min_length=1, description="values, each with each of other grids")

    @property
    def extremes(self) -> list[Any]:
        """Values that stand for all: the ends of a range, or every choice."""
        return list(self.loguniform or self.uniform or self.choice or self.grid or ())


class Tune(Section):
    """A sweep. Trials are compared by bits per byte of the held-out text."""

    search: dict[str, Distribution] = Field(
        min_length=1,
        description="{dotted key of the job: {loguniform | uniform: [low, high]} or {choice | grid: [...]}}",
    )
    trials: PositiveInt | None = Field(None, description="how many; null: the points of the grid")
    max_tokens: Annotated[float, Field(gt=0)] | None = Field(
        None, description="tokens over all trials; none begins that would pass it"
    )
    searcher: Literal["random", "optuna"] = Field("random", description="optuna learns from earlier trials")
    scheduler: Literal["asha", "none"] = Field("asha", description="asha ends trials early that lag behind")
    grace_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of a trial before asha may end it"
    )
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="asha lets one in so many go on at each rung"
    )
    concurrency: PositiveInt | Literal["auto"] = Field(
        "auto", description="trials at a time; auto: as many as the cluster holds"
    )

    @property
    def grid_size(self) -> int:
        """Points of the grid; 1 without one."""
        return math.prod(len(of.grid) for of in self.search.values() if of.grid is not None)

    @property
    def n_trials(self) -> int:
        return self.trials or self.grid_size
