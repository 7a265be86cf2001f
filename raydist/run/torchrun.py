"""A prepared job, trained by the ranks that torchrun started: without Ray, in the same run folder.

    rank 0:  holds the run ─▶ opens the token logs ─▶ AttemptSpec ─┬─▶ train ─▶ audit, report, status
    others:                                                        └─▶ train

For Slurm, profilers and benchmarks. One attempt: a lost rank ends it, and the same command resumes the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from raydist.errors import JobError, TrainingError
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.parallel.world import World
from raydist.run.attempts import (
    POLL_SECONDS,
    Follower,
    attempt_spec,
    first_micro_batch_tokens,
    remembered,
    workers_of_last,
)
from raydist.run.dataset import find_prepared
from raydist.run.lifecycle import Life, keep_collator
from raydist.run.preflight import check_job
from raydist.run.run import account, reported, write_data
from raydist.track.listener import Listener
from raydist.track.progress import make_view
from raydist.track.records import read_metrics
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from raydist.training.torchrun import torchrun_world, train_rank

FAILED, FINISHED = "failed", "finished"
"""What the other ranks hear from rank 0 in place of a spec."""


def train_prepared(job: Job, *, profile: Path | None = None) -> None:
    """Train `job` as the rank that RANK and WORLD_SIZE name, or alone where they are not set.

    Its token logs must be complete: `raydist prepare` makes them. The number of workers is the world size,
    whatever number scaling.num_workers says; a range must hold it. Raises a RaydistError on rank 0; the
    others end with it.
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
                self._check_size()
                with self.life.begun():
                    check_job(self.job)
                    keep_collator(self.job, self.life.folder)
                    self._train()
        finally:
            if self._share is not None:
                _from_main(self._share, self.world)

    def _check_size(self) -> None:
        scaling, size = self.job.scaling, self.world.world_size
        if scaling.elastic and not scaling.least <= size <= scaling.most:
            raise JobError(
                f"{size} ranks were started, and the job takes {scaling.least} to {scaling.most} workers",
                where="scaling.num_workers",
                fix="start as many ranks as the range allows, or change it",
            )

    def _train(self) -> None:
        life, folder = self.life, self.life.folder
        prepared = find_prepared(self.job, folder.data().get("pins"))
        life.listener.phase("packing")
        feed = prepared.feed(life.listener)
        write_data(folder, prepared, feed)
        device_type = self.world.device.type
        size = self.world.world_size
        known = remembered(self.job, folder, device_type, size)
        tokens = known or first_micro_batch_tokens(device_type)
        plan = make_plan(self.job, size, feed.samples_per_epoch, tokens)
        number = folder.next_attempt()
        folder.attempt(number).mkdir(parents=True)
        spent = life.phases.take()
        threads = folder.threads(size) or torch.get_num_threads()  # torchrun, or OMP_NUM_THREADS, sets them
        folder.keep_threads(size, threads)
        spec = attempt_spec(
            prepared,
            folder,
            plan,
            number,
            find_micro_batch=known is None,
            profile=self.profile,
            driver_seconds=spent,
            why=life.why,
            workers_before=workers_of_last(folder),
            elastic=self.job.scaling.elastic,
            threads=threads,
        )
        self._share = None
        _from_main(spec, self.world)
        life.training()
        life.listener.history(read_metrics(folder))
        with reported(life, parent=None):
            with shown(spec, folder, life.listener):
                result = train(spec, self.world)
            account(life, prepared, feed)
            if result.stopped:
                raise life.stopped()


def _from_main(value: AttemptSpec | str | None, world: World) -> AttemptSpec | str | None:
    """Collective: rank 0's value, on every rank."""
    box = [value]
    if world.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def shown(spec: AttemptSpec, folder: RunFolder, listener: Listener) -> Iterator[None]:
    """A thread passes on what is recorded, and what rank 0 is doing, while this process trains."""
    follower, ended = Follower(spec, folder, listener), threading.Event()

    def follow() -> None:
        while not ended.wait(POLL_SECONDS):
            follower.poll()

    thread = threading.Thread(target=follow, name="view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        follower.poll()
