"""What one attempt at training needs to know, the same on every rank, and its result; both picklable."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raydist.job.plan import Mix, Plan
from raydist.job.schema import Job


@dataclass(frozen=True)
class AttemptSpec:
    """run: the run's folder.  logs, eval_logs: token logs by source.  tokenizer: a Hugging Face folder.

    attempt counts from 1 over the life of the run.  growing: the logs to train on are still being made.
    find_micro_batch: nobody knows yet which micro batches fit, so the plan's are only a start.
    profile: a folder for a trace of a few steps; None for none.  modules: folders of the modules whose
    functions the job names, by `module_folders`.  driver_seconds: what the driver spent until then, by phase.
    sent: when it gave the attempt away, as UNIX time; None where nobody waited.
    why: why the attempt is made, for people.  workers_before: of the attempt before; None for the first.
    elastic: other attempts may have other numbers of workers.
    cpus: reserved for each worker.  threads: of each worker, which decide the last bits of its sums on CPU;
    None: as torch has it.  bos: the id that each document begins with; None for none.  mixes: see Feed.
    """

    job: Job
    run: Path
    logs: dict[str, Path]
    tokenizer: Path
    plan: Plan
    attempt: int = 1
    eval_logs: dict[str, Path] = field(default_factory=dict)
    growing: bool = False
    find_micro_batch: bool = False
    profile: Path | None = None
    modules: dict[str, str] = field(default_factory=dict)
    driver_seconds: dict[str, float] = field(default_factory=dict)
    sent: float | None = None
    why: str = ""
    workers_before: int | None = None
    elastic: bool = False
    cpus: int = 1
    threads: int | None = None
    bos: int | None = None
    mixes: tuple[Mix, ...] = ()

    def imported(self, seconds: float) -> AttemptSpec:
        """The same where so much of its start went into imports."""
        start = self.driver_seconds.get("start", 0.0) - seconds
        return replace(self, driver_seconds={**self.driver_seconds, "start": start, "imports": seconds})

    def seconds_before(self) -> dict[str, float]:
        """Seconds by phase until now, where the attempt begins to run. Hosts' clocks may differ a little."""
        seconds = dict(self.driver_seconds)
        if self.sent is not None:
            seconds["start"] = seconds.get("start", 0.0) + max(0.0, time.time() - self.sent)
        return seconds


@dataclass(frozen=True)
class TrainResult:
    """stopped: on request, after a checkpoint and before the last step.  evals: the last, by source.

    resized: stopped so that the run goes on with more workers.
    """

    stopped: bool
    step: int
    samples: int
    tokens_seen: int
    evals: dict[str, dict[str, Any]]
    resized: bool = False
