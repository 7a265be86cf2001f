"""The parameters of the k-th trial. Written down before the trial begins, and never drawn again."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher

from raydist.bucket import mirror
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.job.tune import Distribution
from raydist.sealed import read_sealed_lines
from raydist.sweep.memory import OptunaMemory, Parameters

METRIC = "bits_per_byte"
ENDED = ("finished", "pruned")
"""States of trials that never run again."""


class Journal(Searcher):
    """Gives trial number k its parameters: those of trials.jsonl, else drawn and appended there."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        assert job.tune is not None
        super().__init__(METRIC, "min")
        self._spec, self._seed, self._folder = job.tune, job.seed, folder
        self._length = job.train.max_tokens or 0.0  # a budget needs it, and only a budget does
        self._spent: dict[int, float] = {}
        self._running: set[int] = set()
        self._known = read_parameters(folder.trials_file)
        self._begun: dict[str, int] = {}
        self._domains = {key: _domain(of) for key, of in job.tune.search.items() if of.grid is None}
        self._optuna = None
        if job.tune.searcher == "optuna":
            self._optuna = OptunaMemory(job.tune.search, job.seed, folder.optuna_journal, self._known)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        number = len(self._begun)
        if number >= self._spec.n_trials:
            return self.FINISHED
        known = number < len(self._known)
        parameters = self._known[number] if known else self._draw(number)
        if not known:
            if not self._affords(parameters):
                return None if self._running else self.FINISHED  # one that is pruned leaves tokens
            record = {"number": number, "parameters": parameters}
            self._folder.append_trial(record)
            self._known.append(parameters)
            if self._optuna is not None:
                self._optuna.begin(parameters)
                mirror.publish(self._folder.optuna_journal)
        self._begun[trial_id] = number
        self._running.add(number)
        self._spent[number] = parameters.get("train.max_tokens", self._length)
        return {"number": number}

    def _affords(self, parameters: Parameters) -> bool:
        """What ended counts by the tokens it saw, what runs by its length."""
        budget = self._spec.max_tokens
        length = parameters.get("train.max_tokens", self._length)
        return budget is None or sum(self._spent.values()) + length <= budget

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Optuna learns what came of a trial once that is final; a failed or stopped one is tried again."""
        number, result = self._begun[trial_id], result or {}
        self._running.discard(number)
        if result:
            self._spent[number] = result["tokens"]
        value = result.get(METRIC, math.inf)
        ended = not error and outcome(result, self._folder) in ENDED
        if self._optuna is not None and ended and math.isfinite(value):
            self._optuna.tell(number, value)
            mirror.publish(self._folder.optuna_journal)

    def _draw(self, number: int) -> Parameters:
        if self._optuna is not None:
            return self._optuna.draw(number)
        random = np.random.default_rng([self._seed, number])
        drawn = {key: _plain(domain.sample(random_state=random)) for key, domain in self._domains.items()}
        return {key: drawn.get(key, point) for key, point in self._point(number).items()}

    def _point(self, number: int) -> Parameters:
        """Of the grid; null at keys without one."""
        axes = [of.grid or [None] for of in self._spec.search.values()]
        points = list(itertools.product(*axes))
        return dict(zip(self._spec.search, points[number % len(points)], strict=True))


def outcome(result: dict[str, Any], folder: RunFolder) -> str:
    """How a trial ended, by its last result: one that does not say was ended early.

    folder: the sweep's, which says whether somebody asked it to stop.
    """
    early = "stopped" if folder.stop_asked() else "pruned"
    return str(result.get("state", early))


def read_parameters(file: Path) -> list[Parameters]:
    """Of each trial that was ever begun, in the order of their numbers."""
    return [record["parameters"] for record in read_sealed_lines(file) if "parameters" in record]


def _domain(of: Distribution) -> Any:
    if of.loguniform is not None:
        return tune.loguniform(*of.loguniform)
    return tune.uniform(*of.uniform) if of.uniform is not None else tune.choice(of.choice or [])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
