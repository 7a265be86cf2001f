"""A job from raw files to a trained model: plan, prepare, train, and tell what became of every token.

The composition root. It holds the run's lease, pins the token logs, starts attempts until one ends
by itself, and is the only writer of status.json, data.json, the report and the trackers.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from raydist.cluster.connect import ray_session
from raydist.cluster.resources import gpus, spare
from raydist.errors import JobError, OutOfMemory, RunChanged, Stopped, TrainingError, WorkerLost
from raydist.folder import RunFolder
from raydist.job.identity import differences
from raydist.job.load import job_yaml, load_job
from raydist.job.plan import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS, Plan, make_plan
from raydist.job.schema import Job
from raydist.run.dataset import Prepared, can_begin_early, prepare_first, prepare_logs
from raydist.track.listener import Listener
from raydist.track.progress import make_view
from raydist.track.records import Tail, effective, read_metrics

if TYPE_CHECKING:
    from raydist.feed.feed import Feed
    from raydist.training.attempt_spec import AttemptSpec

T = TypeVar("T")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `metrics`: the last evaluation of each source by name."""

    folder: Path
    state: str
    metrics: dict[str, dict[str, Any]]

    @property
    def model_path(self) -> Path:
        return RunFolder(self.folder).model

    def load_model(self) -> Any:
        """The trained model, from transformers or, with an adapter, from peft."""
        from raydist.model.export import load_trained

        return load_trained(self.model_path)


def run_job(
    job: Job, *, address: str | None = None, listener: Listener | None = None, parent: str | None = None
) -> RunResult:
    """Run `job` to its end, or resume the run of that name. parent: the MLflow run that it is part of.

    Raises a RaydistError; the run's status.json then says failed, or stopped after a checkpoint.
    """
    if job.tune is not None:
        raise JobError(f"{job.name} is a sweep: it has a tune section", fix="raydist tune, or tune: null")
    folder = folder_of(job)
    folder.check_place("run")
    listener = listener or make_view(name=job.name)
    with listener, folder.lease():
        folder.mark("run")
        if _already_finished(job, folder):
            listener.message(f"run {job.name} is finished already; nothing to do")
            return _result(folder)
        with status_of(folder), stop_signals(folder, listener):
            from raydist.run.preflight import check_job

            _claim(job, folder)
            check_job(job)
            _keep_collator(job, folder)
            with (
                ray_session(job.scaling.num_workers, job.scaling.cpus_per_worker, address),
                stop_signals(folder, listener),  # again: joining a cluster puts Ray's own handlers in place
            ):
                _prepare_and_train(job, folder, listener, parent)
        return _result(folder)


def folder_of(job: Job) -> RunFolder:
    return RunFolder(Path(job.storage).expanduser() / job.name)


def _prepare_and_train(job: Job, folder: RunFolder, listener: Listener, parent: str | None) -> None:
    from raydist.model.attention import check_attention

    check_attention(job.model.attn_implementation, "cuda" if job.scaling.on_gpus(gpus()) else "cpu")
    prepared, rest = _prepare(job, folder, listener)
    feed = prepared.feed()
    plan = _plan(job, folder, feed)
    _write_data(folder, prepared, feed)
    stop_if_asked(folder)
    with _reported(job, folder, listener, parent):
        stopped = _attempts(job, folder, prepared, rest, plan, listener)
        if rest is not None:
            if stopped and not rest.done():
                raise stopped_error(folder)
            prepared = _awaited(rest, listener)
            feed = prepared.feed()
            _write_data(folder, prepared, feed)
        _conclude(folder, prepared, feed)
        if stopped:
            raise stopped_error(folder)


# --- the run folder ------------------------------------------------------------------------------


def _already_finished(job: Job, folder: RunFolder) -> bool:
    _refuse_changed(job, folder)
    return folder.status().get("state") == "finished" and not differences(load_job(folder.job_file), job)


def _refuse_changed(job: Job, folder: RunFolder) -> None:
    if not folder.job_file.exists():
        return
    changed = differences(load_job(folder.job_file), job)
    if changed and folder.committed():
        raise RunChanged(
            f"the job differs from the run {job.name} that it would resume:\n  " + "\n  ".join(changed),
            where=str(folder.path),
            why="its checkpoints were trained under the old job",
            fix="give the job a new name, undo the change, or remove the run's folder",
        )


def _claim(job: Job, folder: RunFolder) -> None:
    """Make the folder this job's. What a different job left without a checkpoint is removed."""
    if folder.job_file.exists() and differences(load_job(folder.job_file), job):
        folder.clear()
    folder.stop_flag.unlink(missing_ok=True)
    folder.write_job(job_yaml(job))
    folder.set_status("planning")


def _keep_collator(job: Job, folder: RunFolder) -> None:
    """Its source is no part of the job; a run that went on with another one would not be the same."""
    from raydist.training.collate import collator_fingerprint

    if job.train.collator is None:
        return
    source = collator_fingerprint(job.train.collator)
    if folder.committed() and folder.data().get("collator", source) != source:
        raise RunChanged(
            f"the source of {job.train.collator} differs from what run {job.name} began with",
            where="train.collator",
            why="its checkpoints were trained with the old one",
            fix="restore its module, or give the job a new name",
        )
    folder.add_data(collator=source)


@contextlib.contextmanager
def status_of(folder: RunFolder) -> Iterator[None]:
    """status.json says how the run ended, however it ends."""
    try:
        yield
    except Stopped:
        folder.set_status("stopped")
        raise
    except BaseException as error:
        folder.set_status("failed", error=str(error) or type(error).__name__, kind=type(error).__name__)
        raise
    folder.set_status("finished")


@contextlib.contextmanager
def stop_signals(folder: RunFolder, listener: Listener) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask for a checkpoint and a clean end; a second one ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if folder.stop_flag.exists():
            raise KeyboardInterrupt
        folder.stop_flag.touch()
        if folder.status()["state"] != "training":
            raise stopped_error(folder)
        listener.message("stopping after a checkpoint; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals; `raydist stop` still works
        return
    with _handling(signal.SIGTERM, ask), _handling(signal.SIGINT, ask):
        yield


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def stop_if_asked(folder: RunFolder) -> None:
    if folder.stop_flag.exists():
        raise stopped_error(folder)


def stopped_error(folder: RunFolder) -> Stopped:
    return Stopped(
        f"run {folder.path.name} was stopped", where=str(folder.path), fix="submit the job again to go on"
    )


# --- data ----------------------------------------------------------------------------------------


def _prepare(job: Job, folder: RunFolder, listener: Listener) -> tuple[Prepared, Future[Prepared] | None]:
    """The token logs; or their first windows, while the rest is made beside the training."""
    folder.set_status("preparing")
    pinned = folder.data().get("pins")
    share = spare(job) if can_begin_early(job) else None
    first = prepare_first(job, listener, share, pinned=pinned) if share else None
    if first is None:
        return prepare_logs(job, listener, pinned=pinned, stop=lambda: stop_if_asked(folder)), None
    prepared, rest = first
    return prepared, _in_thread(rest)


def _awaited(rest: Future[Prepared], listener: Listener) -> Prepared:
    if not rest.done():
        listener.phase(
            "preparing", "training has ended; the rest of the token logs, to account for every token"
        )
    return rest.result()


def _write_data(folder: RunFolder, prepared: Prepared, feed: Feed) -> None:
    described = prepared.describe(feed) if prepared.complete else {}
    folder.add_data(pins=prepared.pins(), **described)


# --- attempts ------------------------------------------------------------------------------------


def _attempts(
    job: Job,
    folder: RunFolder,
    prepared: Prepared,
    rest: Future[Prepared] | None,
    plan: Plan,
    listener: Listener,
) -> bool:
    """Train until an attempt ends by itself; True when it was stopped on request.

    A lost worker starts the next attempt from the newest checkpoint; an exception in the training
    function would only repeat, so it ends the run.
    """
    folder.set_status("training")
    listener.phase("training")
    lost = 0
    while True:
        spec = prepared.attempt_spec(folder, plan, folder.next_attempt())
        try:
            return _watch(spec, rest, folder, listener)
        except OutOfMemory as error:
            plan = _halved(job, folder, plan, spec.attempt, error)
            listener.message(f"{error.what}; going on with {plan.micro_batches} of the same global batch")
        except WorkerLost as error:
            lost += 1
            if lost > job.scaling.max_failures:
                raise TrainingError(
                    f"training lost a worker {lost} times",
                    where=str(folder.path),
                    why=error.what,
                    fix="see ray/ in the run's folder; submit again to go on from the last checkpoint",
                ) from error
            listener.message(f"a worker was lost; going on from the last checkpoint ({error.what})")


def _plan(job: Job, folder: RunFolder, feed: Feed) -> Plan:
    """micro_batch_size: auto begins with what an earlier attempt found to fit."""
    start = GPU_MICRO_BATCH_TOKENS if job.scaling.on_gpus(gpus()) else CPU_MICRO_BATCH_TOKENS
    found = folder.data().get("micro_batch_tokens", start)
    return make_plan(job, job.scaling.num_workers, feed.samples_per_epoch, found)


def _halved(job: Job, folder: RunFolder, plan: Plan, attempt: int, error: OutOfMemory) -> Plan:
    """Raises `error` where the job gives the micro batch, or it is one sequence already.

    Also where the attempt did not get so far as to record its start: the model itself does not fit then.
    """
    begun = any(r["kind"] in ("start", "resume") and r["attempt"] == attempt for r in read_metrics(folder))
    above_one = [
        stage.micro_batch_size * stage.block_size for stage in plan.stages if stage.micro_batch_size > 1
    ]
    if job.train.micro_batch_size != "auto" or not above_one or not begun:
        raise error
    tokens = max(above_one) // 2
    folder.add_data(micro_batch_tokens=tokens)
    return make_plan(job, plan.world_size, plan.samples_per_epoch, tokens)


def _watch(spec: AttemptSpec, rest: Future[Prepared] | None, folder: RunFolder, listener: Listener) -> bool:
    """Run one attempt in a thread, so that this one can show its records and receive signals.

    rest: the preparation that goes on beside it; what it raises is raised here.
    """
    from raydist.cluster.trainer import run_attempt

    tail = Tail(folder.metrics_file, offset=_size(folder.metrics_file))
    attempt = _in_thread(lambda: run_attempt(spec, listener.message))
    done = False
    while not done:
        done = attempt.done()  # before the poll, so that the last records are not missed
        for record in tail.poll():
            listener.record(record)
        if rest is not None and rest.done():
            rest.result()
        time.sleep(0 if done else POLL_SECONDS)
    return attempt.result().stopped


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """A daemon thread: a second Ctrl-C must not wait for it."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where the result is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, name="attempt", daemon=True).start()
    return outcome


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- the end -------------------------------------------------------------------------------------


def _conclude(folder: RunFolder, prepared: Prepared, feed: Feed) -> None:
    """What became of every token up to the newest checkpoint, and a sample of the model's text."""
    from raydist.feed.audit import audit
    from raydist.training.checkpoint import newest_valid

    commit = newest_valid(folder)
    counted = audit(feed, commit.samples if commit else 0)
    sample = prepared.sample(folder) if folder.model.exists() else None
    began = next(r for r in reversed(read_metrics(folder)) if r["kind"] in ("start", "resume"))
    parameters = {"total": began["n_parameters"], "trainable": began["n_trainable"]}
    folder.add_data(audit=counted.to_json(), sample=sample, parameters=parameters)


@contextlib.contextmanager
def _reported(job: Job, folder: RunFolder, listener: Listener, parent: str | None) -> Iterator[None]:
    """Trackers follow the run; they and the report say how it ended, however it ends."""
    from raydist.track.report import write_report
    from raydist.track.start import start_trackers

    trackers = start_trackers(job, folder, parent=parent, on_warning=listener.message)
    state, told = "failed", ""
    try:
        yield
        state = "finished"
    except BaseException as error:
        state, told = ("stopped", "") if isinstance(error, Stopped) else ("failed", str(error))
        raise
    finally:
        write_report(folder, state=state, error=told)
        for tracker in trackers:
            tracker.finish(state)


def _result(folder: RunFolder) -> RunResult:
    last = {r["source"]: r for r in effective(folder) if r["kind"] == "eval"}
    return RunResult(folder.path, folder.status()["state"], last)
