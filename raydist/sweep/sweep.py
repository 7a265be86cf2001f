"""All trials of a sweep: claim the folder, prepare the tokens once, search, and tell what was best."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from raydist import files
from raydist.cluster.groups import Unclaimed, groups_of, remove_groups
from raydist.cluster.resources import cpus_per_worker, node_resources, require_room
from raydist.errors import ClusterError, ClusterLost, JobError, TrainingError, first_line
from raydist.folder import RunFolder
from raydist.job.functions import module_folders, named_functions
from raydist.job.load import kept_yaml
from raydist.job.schema import Job
from raydist.job.search import trial_at, trial_job, trial_name
from raydist.job.tune import Tune
from raydist.redact import redact
from raydist.run.dataset import Prepared, prepare_logs
from raydist.run.lifecycle import Life, at_the_end, folder_of, state_after
from raydist.run.preflight import check_job
from raydist.sealed import read_sealed_lines
from raydist.sweep.memory import Parameters
from raydist.sweep.suggest import ENDED, METRIC, Journal, outcome, read_parameters
from raydist.sweep.trial import SweepSpec, TrialRun, curve
from raydist.track.listener import Listener
from raydist.track.mlflow import finish_parent, start_parent
from raydist.track.progress import make_view
from raydist.track.sweep_page import Trial, ranked, write_sweep_page


@dataclass(frozen=True)
class SweepResult:
    """trials: best first.  best: a job file for `raydist submit`; None when no trial finished."""

    folder: Path
    trials: list[Trial]
    best: Path | None


def run_sweep(job: Job, *, address: str | None = None, listener: Listener | None = None) -> SweepResult:
    """Run the sweep of `job`, or go on with the one of that name; no finished trial runs twice.

    Raises TrainingError at the end if trials failed, each of which is recorded; the others count.
    """
    if job.tune is None:
        raise JobError(f"{job.name} has no tune section", fix="raydist submit runs it, or say what to search")
    life = Life(job, "sweep", listener or make_view(name=job.name))
    with life.held(), life.begun():
        for end in (0, -1):
            check_job(trial_at(job, end))
        with life.on_ray(address):
            _prepare_and_search(life)
    return read_sweep(job)


def _prepare_and_search(life: Life) -> None:
    job, folder = life.job, life.folder
    assert job.tune is not None
    shared = job.scaling.cpus_per_worker == "auto"
    least = _scaled(job, cpus_per_worker=1) if shared else job
    room = life.prepare(lambda: require_room(least, "one trial"))
    life.preparing()
    pins = folder.data().get("pins")
    prepared = life.prepare(lambda: prepare_logs(job, life.listener, pinned=pins, stop=life.stop_if_asked))
    _require_held_out(replace(prepared, job=trial_at(job, 0)))
    folder.add_data(pins=prepared.pins())
    life.training()
    asked = job.tune.n_trials if job.tune.concurrency == "auto" else job.tune.concurrency
    at_a_time = min(room, asked, job.tune.n_trials)
    all_workers = _scaled(job, num_workers=at_a_time * job.scaling.most)
    cpus = life.prepare(lambda: cpus_per_worker(all_workers, node_resources()))
    life.listener.phase("searching", f"{job.tune.n_trials} trials, {at_a_time} at a time")
    with _concluded(life) as parent:
        modules = module_folders(function for _, function in named_functions(job))
        spec = SweepSpec(job, folder.path.resolve(), prepared.pins(), parent, {}, cpus, modules)
        _search(spec, life, at_a_time)
        life.stop_if_asked()
        _refuse_failed(folder, read_sweep(job))


def _scaled(job: Job, **scaling: Any) -> Job:
    return job.model_copy(update={"scaling": job.scaling.model_copy(update=scaling)})


def _require_held_out(prepared: Prepared) -> None:
    held_out = sum(source.held_out_documents for source in prepared.feed().sources)
    if held_out + sum(log.n_documents for log in prepared.eval_logs.values()) == 0:
        raise JobError(
            "a sweep without held-out text",
            where="corpus.holdout and eval.sources",
            why="trials are compared by bits per byte of text that none was trained on",
            fix="raise corpus.holdout or name a source in eval.sources",
        )


def _search(spec: SweepSpec, life: Life, at_a_time: int) -> None:
    """Go through all trials; with a new Ray through those that have not ended, where an embedded one is lost.

    Raises ClusterError where Ray cannot be replaced, or Tune gives up.
    """
    lost = 0
    while True:
        ended = {n: state for n, (state, _) in enumerate(_states(spec.job, life.folder)) if state in ENDED}
        try:
            _search_once(replace(spec, ended=ended), life, at_a_time)
            return
        except ClusterLost as error:
            lost += 1
            if not life.ray.can_restart or lost > spec.job.scaling.max_failures:
                raise
            life.listener.message(
                f"Ray was lost; going on with the trials that have not ended ({error.what})"
            )
            life.ray.restart()


def _search_once(spec: SweepSpec, life: Life, at_a_time: int) -> None:
    """Tune keeps its own records in ray/attempt-N; nothing is ever read from there."""
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a job's relative paths mean this folder
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints errors even where verbose is 0
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # OutcomeLog says what goes wrong
    assert spec.job.tune is not None
    folder = life.folder
    for path in (folder.trials_file, folder.optuna_journal):
        files.cut_torn_line(path)
    journal = Journal(spec.job, folder)
    # no CPU: all are for the workers; and Ray refuses a request for nothing
    trainable = tune.with_resources(tune.with_parameters(TrialRun, spec=spec), {"memory": 2**20})
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=journal,
            scheduler=_scheduler(spec.job.tune),
            num_samples=spec.job.tune.n_trials,
            max_concurrent_trials=at_a_time,
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{folder.next_attempt()}",
            storage_path=str(folder.ray.resolve()),
            stop=StopWhenAsked(folder),
            callbacks=[OutcomeLog(spec, folder, life.listener), FreeWorkers(spec.job)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=spec.job.scaling.max_failures),
            verbose=0,
        ),
    )
    try:
        life.ray.do(tuner.fit, "search")
    except (RayError, TuneError) as error:
        raise ClusterError(
            f"Ray Tune gave up: {first_line(error)}",
            where=str(folder.ray_output),
            fix="submit the sweep again: it goes on with the trials that have not ended",
        ) from error


def _scheduler(spec: Tune) -> TrialScheduler:
    """Time is percent of a trial's own length, so that trials of any block size meet at the same rungs."""
    if spec.scheduler == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="percent",
        metric=METRIC,
        mode="min",
        max_t=100,
        grace_period=math.ceil(100 * spec.grace_ratio),
        reduction_factor=spec.reduction_factor,
    )


class StopWhenAsked(tune.Stopper):
    """Ends every trial once the sweep is asked to stop."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._folder.stop_asked()


class OutcomeLog(tune.Callback):
    """Writes down how trials end, and says so."""

    def __init__(self, spec: SweepSpec, folder: RunFolder, listener: Listener) -> None:
        self._spec, self._folder, self._listener = spec, folder, listener
        self._best, self._done = math.inf, 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks, for a restoration that is never made; a listener cannot be pickled."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._best = min(self._best, result[METRIC])
        self._show()
        if _number(trial) in self._spec.ended:
            return  # an ended trial only repeats its results
        shown = f"{result[METRIC]:.4f} bits per byte at {result['percent']:.0f}%"
        self._listener.message(f"trial {_number(trial):03d}  {shown}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        self._end(_number(trial), outcome(result, self._folder), result.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(_number(trial), "failed", str(trial.get_error() or "its process died").splitlines()[0])

    def _show(self) -> None:
        assert self._spec.job.tune is not None
        self._listener.trials(self._done, self._spec.job.tune.n_trials, self._best)

    def _end(self, number: int, state: str, error: str) -> None:
        self._done += 1
        self._show()
        if number in self._spec.ended:
            return  # it was recorded when it happened
        error = redact(error)
        self._folder.append_trial({"number": number, "state": state, "error": error})
        self._listener.message(f"trial {number:03d}  {state}{': ' * bool(error)}{error}")


class FreeWorkers(tune.Callback):
    """Frees what the workers of a trial reserve whose process died, or no other trial would find room."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._unclaimed: Unclaimed | None = None

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        remove_groups(self._folder(trial))
        self._unclaimed = Unclaimed()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_recover(iteration, trials, trial)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._unclaimed is not None:
            self._unclaimed.remove(group for trial in trials for group in groups_of(self._folder(trial)))

    def _folder(self, trial: Any) -> RunFolder:
        path = folder_of(self._job).path
        return RunFolder(path.with_name(trial_name(self._job, _number(trial))))


def _number(trial: Any) -> int:
    return int(trial.config["number"])


def _states(job: Job, folder: RunFolder) -> list[tuple[str, str]]:
    """State and error of each trial by number: finished if its own folder says so, else as last recorded."""
    last = {record["number"]: record for record in read_sealed_lines(folder.trials_file)}
    return [_state(last[n], folder.path.with_name(trial_name(job, n))) for n in sorted(last)]


def _state(last: dict[str, Any], path: Path) -> tuple[str, str]:
    state = RunFolder(path).refresh().status().get("state")
    if state == "finished":
        return "finished", ""
    return last.get("state", "stopped" if state == "stopped" else "running"), last.get("error", "")


# --- the end -------------------------------------------------------------------------------------


@contextmanager
def _concluded(life: Life) -> Iterator[str | None]:
    """Gives the sweep's MLflow run; best.yaml, the page and MLflow say how it ended, however it ends."""
    job, folder, warn = life.job, life.folder, life.listener.message
    parent = start_parent(job, folder, on_warning=warn) if job.tracking.mlflow else None

    def conclude(error: BaseException | None) -> None:
        state, result = state_after(error), read_sweep(job)
        best = _best(result.trials)
        try:
            if best is not None:
                _write_best(job, folder, result.trials, best)
            write_sweep_page(
                folder, result.trials, state=state, error=str(error) if state == "failed" else ""
            )
        finally:
            if parent is not None:
                metrics = {METRIC: best.bits_per_byte} if best and best.bits_per_byte else {}
                finish_parent(job, folder, state, metrics, best.parameters if best else {}, on_warning=warn)

    with at_the_end(conclude, folder.path):
        yield parent


def _best(trials: Sequence[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.state == "finished"), None)


def _write_best(job: Job, folder: RunFolder, trials: Sequence[Trial], best: Trial) -> None:
    """best.yaml is a job of its own name: it trains the best trial's job again."""
    kept = {"checkpoint.save_total_limit": job.checkpoint.save_total_limit}
    of_best = trial_job(job, "best", {**best.parameters, **kept})
    head = f"# The best of {len(trials)} trials: {best.name}, {best.bits_per_byte:.4f} bits per byte\n"
    files.write_text(folder.best_file, head + kept_yaml(of_best))


def _refuse_failed(folder: RunFolder, result: SweepResult) -> None:
    failed = [trial for trial in result.trials if trial.state == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(result.trials)} trials failed; the others are compared",
            where="; ".join(str(folder.path.parent / trial.name) for trial in failed),
            why="\n".join(f"{trial.name}: {trial.error}" for trial in failed),
            fix="submit the sweep again to try these once more, and only these",
        )


def read_sweep(job: Job) -> SweepResult:
    """What the folders of the sweep and its trials say."""
    folder = folder_of(job)
    known = zip(read_parameters(folder.trials_file), _states(job, folder), strict=True)
    trials = [_trial(job, number, *what) for number, what in enumerate(known)]
    best = folder.best_file
    return SweepResult(folder.path, ranked(trials), best if best.exists() else None)


def _trial(job: Job, number: int, parameters: Parameters, known: tuple[str, str]) -> Trial:
    of_trial = trial_job(job, number, parameters)
    points = [(result["tokens"], result[METRIC]) for result in curve(of_trial, folder_of(of_trial))]
    tokens, bits = points[-1] if points else (0, None)
    return Trial(of_trial.name, parameters, known[0], bits, tokens, points, known[1])
