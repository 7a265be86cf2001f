"""What Optuna knows of a sweep: a study in a journal file of the sweep's folder, which the next driver reads.

A draw is a function of the seed, the trial's number and the trials before it, all of which a resumed sweep
has. trials.jsonl says which trials began; the journal follows it, and is made again from it where it is gone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState, create_trial

from raydist.errors import RunError, first_line
from raydist.job.tune import Distribution

Parameters = dict[str, Any]


class NoLock(JournalFileOpenLock):
    """The sweep's lease keeps the folder to one writer; a lock file would outlive a killed one."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return


class OptunaMemory:
    """Draws parameters by Optuna's TPE and remembers what came of them.

    search: what is searched, by dotted key.  file: the journal, made where it is missing.
    known: the parameters of every trial that began, by number.
    Raises RunError where the journal cannot be read.
    """

    def __init__(
        self, search: dict[str, Distribution], seed: int, file: Path, known: list[Parameters]
    ) -> None:
        self._search, self._seed = search, seed
        self._distributions = {key: _distribution(of) for key, of in search.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = JournalStorage(JournalFileBackend(str(file), NoLock(str(file))))
            self._study = _study(storage)
            recorded = len(self._study.get_trials(deepcopy=False))
        except Exception as error:  # whatever a damaged file makes Optuna raise
            raise RunError(
                f"Optuna's journal {file.name} cannot be read",
                where=str(file),
                why=first_line(error),
                fix="remove it and submit the sweep again: trials.jsonl and the trials' results give it back",
            ) from error
        for parameters in known[recorded:]:
            self.begin(parameters)

    def draw(self, number: int) -> Parameters:
        """The parameters of the trial of this number, which is not recorded yet. Writes nothing."""
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        study = _study(None, sampler)
        study.add_trials(self._study.get_trials()[:number])
        drawn = study.ask(self._distributions).params
        return {
            key: of.choice[drawn[key]] if of.choice is not None else drawn[key]
            for key, of in self._search.items()
        }

    def begin(self, parameters: Parameters) -> None:
        """Record the next trial."""
        params = {
            key: of.choice.index(parameters[key]) if of.choice is not None else parameters[key]
            for key, of in self._search.items()
        }
        begun = create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions)
        self._study.add_trial(begun)

    def tell(self, number: int, value: float) -> None:
        """Record what came of a trial that ended for good; the first value counts."""
        if not self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._study.tell(number, value)


def _study(storage: JournalStorage | None, sampler: Any = None) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        sampler=sampler or optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.NopPruner(),
        study_name="sweep",
        direction="minimize",
        load_if_exists=True,
    )


def _distribution(of: Distribution) -> BaseDistribution:
    """A choice is drawn by its place in the list, since its values may be of any kind."""
    if of.loguniform is not None:
        return FloatDistribution(*of.loguniform, log=True)
    if of.uniform is not None:
        return FloatDistribution(*of.uniform)
    return CategoricalDistribution(range(len(of.choice or [])))
