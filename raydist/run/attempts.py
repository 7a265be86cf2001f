"""The attempts at a run's training, one after another until one ends by itself.

    the cluster's nodes ──> plan_attempt ──> AttemptSpec ──> Ray Train ──> finished, or stopped on request
          ▲                                                      │
          └──── a worker was lost, a micro batch did not fit, ───┘
                or there is room for more workers

An exception in the training function would only come again, so it ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raydist.background import in_background
from raydist.cluster.resources import Resources, cpus_per_worker
from raydist.errors import ClusterError, ClusterLost, OutOfMemory, RaydistError, StorageError, WorkerLost
from raydist.folder import RunFolder
from raydist.job.functions import module_folders, named_functions
from raydist.job.plan import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS, Plan, make_plan
from raydist.job.schema import Job
from raydist.run.dataset import Prepared, Rest
from raydist.run.elastic import Growth, Workers
from raydist.run.hang import HangWatch
from raydist.run.lifecycle import Life
from raydist.run.notice import NoticeWatch
from raydist.track.humanize import workers
from raydist.track.listener import Listener
from raydist.track.records import Record, Tail, read_metrics

if TYPE_CHECKING:
    from raydist.training.attempt_spec import AttemptSpec, TrainResult

POLL_SECONDS = 0.5
LOOK_SECONDS = 2.0
"""Between two looks into a bucket."""


def train(
    life: Life,
    prepared: Prepared,
    samples_per_epoch: int | None,
    rest: Rest | None,
    *,
    profile: Path | None = None,
) -> TrainResult:
    """Attempts until one ends by itself: at the run's last step, or stopped after a checkpoint.

    samples_per_epoch: the feed's.  rest: the preparation that goes on meanwhile; what it raises is raised
    here.  profile: see AttemptSpec. Raises TrainingError when workers were lost more often than the job
    allows, and whatever else ended an attempt.
    """
    job, folder, lost = life.job, life.folder, 0

    def survived(error: RaydistError, what: str) -> str:
        """Why the next attempt is made. Raises `error` where the job does not allow one."""
        nonlocal lost
        lost += 1
        if lost > job.scaling.max_failures:
            raise type(error)(
                f"training lost {what} {lost} times, and scaling.max_failures is {job.scaling.max_failures}",
                where=error.where or str(folder.path),
                why=error.what,
                fix="submit again to go on from the last checkpoint; Ray's own logs are in ray/ of the run",
            ) from error
        why = f"{what} was lost; going on from the last checkpoint ({error.what})"
        life.listener.message(why)
        return why

    life.training()
    life.listener.history(read_metrics(folder))
    start: int | None = None
    why, choice = life.why, Workers(job, folder)
    while True:
        life.phases.begin("start")
        life.require_held()
        try:
            life.ray.require()
            job, nodes = choice.of_next_attempt()
        except ClusterLost as error:
            if not life.ray.can_restart:
                raise
            why = survived(error, "Ray")
            life.ray.restart()
            if rest is not None:
                rest.go_on()
            continue
        known = remembered(job, folder, device_type(job, nodes), job.scaling.most)
        plan = plan_attempt(job, samples_per_epoch, nodes, known or start)
        cpus = cpus_per_worker(job, nodes)
        spec = attempt_spec(
            replace(prepared, job=prepared.job.model_copy(update={"scaling": job.scaling})),
            folder,
            plan,
            folder.next_attempt(),
            find_micro_batch=known is None,
            profile=profile,
            driver_seconds=life.phases.take(),
            why=why,
            workers_before=workers_of_last(folder),
            elastic=life.job.scaling.elastic,
            cpus=cpus,
            threads=threads_of(job, folder, cpus),
        )
        try:
            result = _watch(spec, life, rest)
            if not result.resized or folder.stop_asked():
                return result
            why = "there is room for more workers"
        except OutOfMemory as error:
            tokens = halved(job, folder, plan, spec.attempt, error)
            smaller = plan_attempt(job, samples_per_epoch, nodes, tokens).micro_batches
            why = f"{error.what}; going on with {smaller} of the same global batch"
            life.listener.message(why)
        except (WorkerLost, ClusterLost) as error:
            if life.ray.lost():
                continue  # to where Ray is required
            why = survived(error, "a worker")
            # a GPU node that is gone now may be back before the next attempt's workers start
            known = remembered(job, folder, device_type(job, nodes), plan.world_size)
            start = known or start or starting_tokens(job, nodes)
        except ClusterError as error:
            if not choice.take_fewer(plan.world_size):
                raise
            why = f"there was no room for {workers(plan.world_size)}"
            life.listener.message(f"{error.what}; going on with fewer")


def plan_attempt(
    job: Job, samples_per_epoch: int | None, nodes: Sequence[Resources], found: int | None
) -> Plan:
    """The plan of an attempt that begins on these nodes.

    found: tokens of a micro batch that earlier attempts know to fit, for `micro_batch_size: auto`.
    """
    tokens = found or starting_tokens(job, nodes)
    return make_plan(job, job.scaling.most, samples_per_epoch, tokens)


def device_type(job: Job, nodes: Sequence[Resources]) -> str:
    """What the job's workers would run on: cuda or cpu."""
    return "cuda" if job.scaling.on_gpus(sum(node.get("GPU", 0) for node in nodes)) else "cpu"


def starting_tokens(job: Job, nodes: Sequence[Resources]) -> int:
    """Tokens of a micro batch that `auto` begins with where nothing is known."""
    return first_micro_batch_tokens(device_type(job, nodes))


def first_micro_batch_tokens(device_type: str) -> int:
    return GPU_MICRO_BATCH_TOKENS if device_type == "cuda" else CPU_MICRO_BATCH_TOKENS


def remembered(job: Job, folder: RunFolder, device_type: str, workers: int) -> int | None:
    """Tokens of a micro batch that the run knows to fit: found by trying on such a device, or by halving.

    workers: of the attempt that asks. What as many found comes first. What was halved holds for other numbers
    too, but where the model is sharded not for more: then each has a smaller part of it.
    """
    tried = [
        record
        for record in read_metrics(folder)
        if record.get("device") == device_type and "micro_batch_tokens" in record
    ]
    as_many = [record for record in tried if record.get("world_size") == workers]
    found = [record["micro_batch_tokens"] for record in as_many or tried][-1:]
    by_workers = folder.data().get("micro_batch_halved", {})
    sharded = job.strategy.name != "ddp"
    halved = [tokens for n, tokens in by_workers.items() if not sharded or workers <= int(n)]
    of_old = folder.data().get("micro_batch_tokens")
    return min([*found, *halved, *([of_old] if of_old else [])], default=None)


def halved(job: Job, folder: RunFolder, plan: Plan, attempt: int, error: OutOfMemory) -> int:
    """Half the tokens of the attempt's largest micro batch, which the run's folder keeps for later attempts.

    plan: what the attempt began with; its workers may have found other micro batches.
    Raises `error` where the job says how large micro batches are, or they are one sequence already. Also
    where the attempt did not get as far as to record its start, or a try before: then the model itself does
    not fit.
    """
    starts = [record for record in read_metrics(folder) if record["kind"] in ("try", "start", "resume")]
    begun = next((record for record in reversed(starts) if record["attempt"] == attempt), None)
    if begun and "micro_batch_tokens" in begun:
        tokens = begun["micro_batch_tokens"]
        plan = make_plan(job, plan.world_size, plan.samples_per_epoch, tokens)
    above_one = [
        stage.micro_batch_size * stage.block_size for stage in plan.stages if stage.micro_batch_size > 1
    ]
    if job.train.micro_batch_size != "auto" or not above_one or begun is None:
        raise error
    tokens = max(above_one) // 2
    by_workers = folder.data().get("micro_batch_halved", {})
    folder.add_data(micro_batch_halved={**by_workers, str(plan.world_size): tokens})
    return tokens


def attempt_spec(
    prepared: Prepared,
    folder: RunFolder,
    plan: Plan,
    attempt: int,
    *,
    find_micro_batch: bool = False,
    profile: Path | None = None,
    driver_seconds: dict[str, float] | None = None,
    why: str = "",
    workers_before: int | None = None,
    elastic: bool = False,
    cpus: int = 1,
    threads: int | None = None,
) -> AttemptSpec:
    """An attempt that is about to be given away. Paths are absolute: a worker's working directory is another.

    find_micro_batch: if the job leaves it open. All but it: see AttemptSpec.
    """
    from raydist.model.build import base_path
    from raydist.training.attempt_spec import AttemptSpec

    job, tokenizer = prepared.job, Path(prepared.tokenizer.folder)
    if job.model.base is not None:
        model = job.model.model_copy(update={"base": base_path(job)})
        job = job.model_copy(update={"model": model})
    return AttemptSpec(
        job=job,
        run=folder.path.resolve(),
        logs={name: log.path for name, log in prepared.logs.items()},
        eval_logs={name: log.path for name, log in prepared.eval_logs.items()},
        tokenizer=tokenizer.resolve() if tokenizer.is_dir() else tokenizer,
        plan=plan,
        attempt=attempt,
        growing=not prepared.complete,
        find_micro_batch=find_micro_batch and job.train.micro_batch_size == "auto",
        profile=profile,
        modules=module_folders(function for _, function in named_functions(job)),
        driver_seconds=driver_seconds or {},
        sent=time.time(),
        why=why,
        workers_before=workers_before,
        elastic=elastic,
        cpus=cpus,
        threads=threads,
        bos=prepared.bos,
        mixes=prepared.mixes,
    )


def workers_of_last(folder: RunFolder) -> int | None:
    """Workers of the newest attempt that began to train; None before the first."""
    begun = (r.get("world_size") for r in reversed(read_metrics(folder)) if r["kind"] in ("start", "resume"))
    return next(begun, None)


def threads_of(job: Job, folder: RunFolder, cpus: int) -> int:
    """Threads of each worker, which the folder keeps: sums on CPU may differ in their last bits by them.

    cpus: reserved for each worker. A run goes on with the threads that it began with, on any machine, unless
    the job names another number. With another number of workers it takes the CPUs that each has then.
    """
    workers = job.scaling.most
    kept = folder.threads(workers) if job.scaling.cpus_per_worker == "auto" else None
    folder.keep_threads(workers, kept or cpus)
    return kept or cpus


class Follower:
    """Passes on to the listener what an attempt records from now on, and what its rank 0 is doing."""

    def __init__(
        self,
        spec: AttemptSpec,
        folder: RunFolder,
        listener: Listener,
        heard: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._attempt, self._folder, self._listener, self._heard = spec.attempt, folder, listener, heard
        records = folder.metrics_file
        self._looked = time.monotonic()
        self._tail = Tail(records, offset=records.stat().st_size if records.exists() else 0)
        listener.phase(f"starting {workers(spec.plan.world_size)}")

    def poll(self, *, last: bool = False) -> None:
        """last: nothing more will come."""
        if last or time.monotonic() - self._looked >= LOOK_SECONDS:
            with suppress(*(() if last else (StorageError,))):  # the next look may succeed
                self._folder.refresh()
            self._looked = time.monotonic()
        for record in self._tail.poll():
            self._listener.record(record)
            self._heard(record)
        if now := self._folder.progress(self._attempt):
            self._listener.progress(*now)


def _watch(spec: AttemptSpec, life: Life, rest: Rest | None) -> TrainResult:
    """One attempt, in a thread, so that this one can pass on its records and receive signals.

    Raises ClusterLost when Ray is gone meanwhile.
    """
    from raydist.cluster.trainer import run_attempt

    listener = life.listener
    watch = HangWatch(life.folder, spec.attempt, life.job.scaling.hang_timeout, listener.message)
    notices = NoticeWatch(life.folder, spec.attempt, listener.message)
    growth = Growth(life.job, life.folder, spec, listener.message)

    def heard(record: Record) -> None:
        watch.record(record)
        notices.record(record)
        growth.record(record)

    follower = Follower(spec, life.folder, listener, heard)
    patient = spec.plan.world_size == life.job.scaling.least
    attempt = in_background(lambda: run_attempt(spec, listener.message, patient=patient), "attempt")
    done = False
    while not done:
        done = attempt.done()  # before the poll, so that the last records are not missed
        follower.poll(last=done)
        making = [rest.making] if rest is not None else []
        if not done or (rest is not None and rest.failed):
            life.ray.require(attempt, *making, *growth.looking)
        if rest is not None and rest.failed:
            rest.result()
        if not done:
            watch.look()
            notices.look()
            if rest is None or rest.done:
                growth.look()
            time.sleep(POLL_SECONDS)
    if not life.ray.lost():
        growth.close()
    try:
        return attempt.result()
    except RaydistError as error:
        raise watch.explained(error) from error
