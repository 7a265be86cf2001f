"""A prepared job, trained by the ranks that torchrun started: without Ray, in the same run folder.

    rank 0:  holds the run ─▶ opens the token logs ─▶ AttemptSpec ─┬─▶ train ─▶ audit, report, status
    others:                                                        └─▶ train

For Slurm, profilers and benchmarks. One attempt: a lost rank ends it, and the same command resumes the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from raydist.errors import TrainingError
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.parallel.world import World
from raydist.run.attempts import attempt_spec, first_micro_batch_tokens
from raydist.run.dataset import find_prepared
from raydist.run.lifecycle import Life, keep_collator
from raydist.run.preflight import check_job
from raydist.run.run import account, reported, write_data
from raydist.track.listener import Listener
from raydist.track.progress import make_view
from raydist.track.records import Tail
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from raydist.training.torchrun import torchrun_world, train_rank

FAILED, FINISHED = "failed", "finished"
"""What the other ranks hear from rank 0 in place of a spec."""


def train_prepared(job: Job, *, profile: Path | None = None) -> None:
    """Train `job` as the rank that RANK and WORLD_SIZE name, or alone where they are not set.

    Its token logs must be complete: `raydist prepare` makes them. The number of workers is the world size,
    whatever scaling.num_workers says. Raises a RaydistError on rank 0; the others end with it.
    """
    with torchrun_world() as world:
        if world.is_main:
            _Lead(job, world, profile).run()
            return
        spec = _from_main(None, world)
        if spec == FAILED:
            raise TrainingError("rank 0 ended before training began", fix="see the error of rank 0")
        if isinstance(spec, AttemptSpec):
            train_rank(spec, world)


class _Lead:
    """What rank 0 does besides training: all that a driver does under Ray."""

    def __init__(self, job: Job, world: World, profile: Path | None) -> None:
        self.job, self.world, self.profile = job, world, profile
        self.life = Life(job, "run", make_view(name=job.name))
        self._share: AttemptSpec | str | None = FAILED
        """What the other ranks still wait for."""

    def run(self) -> None:
        try:
            with self.life.held():
                if self.life.finished:
                    self._share = FINISHED
                    self.life.listener.message(f"run {self.job.name} is finished already; nothing to do")
                    return
                with self.life.begun():
                    check_job(self.job)
                    keep_collator(self.job, self.life.folder)
                    self._train()
        finally:
            if self._share is not None:
                _from_main(self._share, self.world)

    def _train(self) -> None:
        life, folder = self.life, self.life.folder
        prepared = find_prepared(self.job, folder.data().get("pins"))
        feed = prepared.feed()
        write_data(folder, prepared, feed)
        tokens = folder.data().get("micro_batch_tokens") or first_micro_batch_tokens(self.world.device.type)
        plan = make_plan(self.job, self.world.world_size, feed.samples_per_epoch, tokens)
        number = folder.next_attempt()
        folder.attempt(number).mkdir(parents=True)
        spent = life.phases.take()
        spec = attempt_spec(prepared, folder, plan, number, profile=self.profile, driver_seconds=spent)
        self._share = None
        _from_main(spec, self.world)
        life.training()
        life.listener.phase("training")
        with reported(life, parent=None):
            result = train(spec, self.world, hooks=[Show(folder, life.listener)])
            account(folder, prepared, feed)
            if result.stopped:
                raise life.stopped()


def _from_main(value: AttemptSpec | str | None, world: World) -> AttemptSpec | str | None:
    """Collective: rank 0's value, on every rank."""
    box = [value]
    if world.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


class Show(Hook):
    """Shows the run's records while the process that trains is the one that shows them."""

    def __init__(self, folder: RunFolder, listener: Listener) -> None:
        records = folder.metrics_file
        self._tail = Tail(records, offset=records.stat().st_size if records.exists() else 0)
        self._listener = listener

    def on_start(self, attempt: Attempt) -> None:
        self._show()

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if result.loss is not None:
            self._show()

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        self._show()

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        self._show()

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        self._show()

    def _show(self) -> None:
        for record in self._tail.poll():
            self._listener.record(record)
