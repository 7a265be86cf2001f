"""The part of a job that makes it a sweep."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from raydist.job.section import Section

Range = Annotated[tuple[float, float], Field(description="[low, high]")]


class Distribution(Section):
    """What a searched key may be: exactly one of these."""

    loguniform: Range | None = Field(None, description="[low, high]; equal chances per factor")
    uniform: Range | None = Field(None, description="[low, high]")
    choice: list[Any] | None = Field(None, min_length=1, description="values, drawn with equal chances")
    grid: list[Any] | None = Field(None, min_length=1, description="values, each with each of other grids")

    @model_validator(mode="after")
    def _one_of_them(self) -> Distribution:
        if sum(value is not None for value in (self.loguniform, self.uniform, self.choice, self.grid)) != 1:
            raise ValueError("give exactly one of loguniform, uniform, choice and grid")
        low, high = self.loguniform or self.uniform or (0, 1)
        if low >= high:
            raise ValueError(f"the range [{low:g}, {high:g}] is inverted or empty; low comes first")
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"loguniform needs a low end above 0, not {low:g}")
        return self

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

    @model_validator(mode="after")
    def _counts(self) -> Tune:
        grids = [key for key, of in self.search.items() if of.grid is not None]
        if grids and self.searcher == "optuna":
            raise ValueError(f"optuna has no grid ({', '.join(grids)}); give choice instead")
        drawn = len(grids) < len(self.search)
        if self.trials is None and drawn:
            raise ValueError("say how many trials: only a grid has a number of its own")
        if self.n_trials < self.grid_size or (self.n_trials > self.grid_size and not drawn):
            raise ValueError(f"trials: {self.n_trials}, but the grid has {self.grid_size} points")
        return self
