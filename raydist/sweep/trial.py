"""One trial under Ray Tune: an ordinary run, whose evaluations are the trial's results."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from raydist.errors import RaydistError, Stopped
from raydist.folder import RunFolder
from raydist.job.functions import find_in
from raydist.job.plan import tokens_after
from raydist.job.schema import Job
from raydist.job.search import trial_job
from raydist.places import shown
from raydist.run.lifecycle import folder_of
from raydist.run.run import run_job
from raydist.sweep.suggest import METRIC, read_parameters
from raydist.track.listener import Listener
from raydist.track.records import Record, effective

Result = dict[str, Any]
ROOM_SECONDS = "600"
"""A trial's workers may wait so long for those of a trial that was ended to make their last checkpoint."""


@dataclass(frozen=True)
class SweepSpec:
    """What all trials share.

    pins: the token logs.  parent: the sweep's MLflow run.  ended: which ran before, and how they ended.
    cpus: for each worker, so that as many trials fit as run at a time.
    modules: folders of the modules whose functions the job names.
    """

    job: Job
    folder: Path
    pins: dict[str, Any]
    parent: str | None
    ended: dict[int, str]
    cpus: int
    modules: dict[str, str] = field(default_factory=dict)

    def trial(self, number: int) -> Job:
        parameters = read_parameters(RunFolder(self.folder).refresh().trials_file)[number]
        shared = {"storage": shown(self.folder.parent), "scaling.cpus_per_worker": self.cpus}
        return trial_job(self.job, number, {**shared, **parameters})


class Evaluations(Listener):
    """Calls `report` with a result for each step of a run that was evaluated."""

    def __init__(self, job: Job, report: Callable[[Result], None]) -> None:
        self._job, self._report = job, report
        self._steps = 1
        self._held: list[Record] = []

    def record(self, record: Record) -> None:
        if record["kind"] in ("start", "resume"):
            self._steps = record["steps"]
        if record["kind"] == "eval":
            self._held.append(record)
        else:
            self.flush()

    def flush(self) -> None:
        if self._held:
            step = self._held[0]["step"]
            n_bytes = sum(r["n_bytes"] for r in self._held)
            bits = sum(r["bits_per_byte"] * r["n_bytes"] for r in self._held) / n_bytes
            percent, self._held = 100 * step / self._steps, []
            self._report({METRIC: bits, "percent": percent, "tokens": tokens_after(self._job, step)})


def curve(job: Job, folder: RunFolder) -> list[Result]:
    """The results of a run so far, from its folder."""
    results: list[Result] = []
    evaluations = Evaluations(job, results.append)
    for record in effective(folder.refresh()):
        evaluations.record(record)
    evaluations.flush()
    return results


class TrialRun(tune.Trainable):
    """Steps are evaluations. Ended early, it asks its run for a checkpoint and waits for it."""

    def setup(self, config: dict[str, Any], spec: SweepSpec) -> None:  # type: ignore[override]
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = ROOM_SECONDS
        os.environ.setdefault("WANDB_RUN_GROUP", spec.job.name)
        find_in(spec.modules)
        self._results: queue.Queue[Result] = queue.Queue()
        self._last: Result = {METRIC: math.inf, "percent": 0.0, "tokens": 0}
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, args=(spec, config["number"]), daemon=True)
        self._thread.start()

    def step(self) -> Result:
        """The last evaluation is given once the run has ended, since Tune may end the trial by it."""
        result = self._results.get()
        if result.get("percent") == 100 and "done" not in result:
            result |= self._results.get()
        self._last |= result
        return dict(self._last)

    def cleanup(self) -> None:
        self._cancelled = True
        while self._thread.is_alive():
            if self._folder is not None and self._folder.path.exists():
                self._folder.ask_to_stop()
            self._thread.join(0.5)

    _folder: RunFolder | None = None

    def _run(self, spec: SweepSpec, number: int) -> None:
        try:
            state = self._train(spec, number)
        except Stopped:
            self._results.put({"done": True, "state": "stopped"})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the sweep goes on
            text = str(error) if isinstance(error, RaydistError) else f"{type(error).__name__}: {error}"
            self._results.put({"done": True, "state": "failed", "error": text})
        else:
            self._results.put({"done": True, "state": state})

    def _train(self, spec: SweepSpec, number: int) -> str:
        job = spec.trial(number)
        self._folder = folder = folder_of(job)
        for result in curve(job, folder):
            self._results.put(result)
        if number in spec.ended:
            return spec.ended[number]
        if self._cancelled:
            raise Stopped(f"{job.name} was ended before it began")
        folder.mark("run")
        if not folder.data_file.exists():
            folder.add_data(pins=spec.pins)
        run_job(job, listener=Evaluations(job, self._results.put), parent=spec.parent)
        return "finished"
