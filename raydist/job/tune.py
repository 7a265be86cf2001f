"""The `tune` section, which makes a job a sweep."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from raydist.job.section import Count, Section, Width

Range = Annotated[tuple[float, float], Field(description="[low, high]")]


class Distribution(Section):
    """The values of a searched key: exactly one of these is given."""

    loguniform: Range | None = Field(None, description="[low, high]; uniform on a log scale")
    uniform: Range | None = Field(None, description="[low, high]; uniform")
    choice: list[Any] | None = Field(None, min_length=1, description="values, each equally likely")
    grid: list[Any] | None = Field(
        None, min_length=1, description="values; every combination of grids is a trial"
    )

    @property
    def extremes(self) -> list[Any]:
        """Values that stand for all: the ends of a range, or every choice."""
        return list(self.loguniform or self.uniform or self.choice or self.grid or ())


class Tune(Section):
    """A sweep. Its trials are compared by bits per byte of the held-out text."""

    search: dict[str, Distribution] = Field(
        min_length=1,
        description="{dotted key of the job: {loguniform | uniform: [low, high]} or {choice | grid: [...]}}",
    )
    trials: Width | None = Field(None, description="number of trials; null: one for each point of the grid")
    max_tokens: Annotated[float, Field(gt=0)] | None = Field(
        None, description="budget: tokens over all trials; a trial that would exceed it does not start"
    )
    searcher: Literal["random", "optuna"] = Field("random", description="optuna learns from earlier trials")
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha ends trials early that fall behind the others"
    )
    grace_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of a trial's length before asha may end it"
    )
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3.0, description="at each rung asha lets one trial in so many go on"
    )
    concurrency: Count | Literal["auto"] = Field(
        "auto", description="trials at a time; auto: as many as fit on the cluster"
    )

    @property
    def grid_size(self) -> int:
        """Points of the grid; 1 without one."""
        return math.prod(len(searched.grid) for searched in self.search.values() if searched.grid is not None)

    @property
    def n_trials(self) -> int:
        return self.trials or self.grid_size
