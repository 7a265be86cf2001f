"""The life of a run's or sweep's folder: who may take it, what it goes through, and how it ends.

    held ──> begun: planning ──> preparing ──> training ──> finished | stopped | failed
      │        │                                               ▲
      │        └─ what a changed job left is removed           │ raydist stop, Ctrl-C or SIGTERM: stopped
      └─ refused: somebody else's folder, a living driver, a job that differs from what was trained

status.json is written here alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from raydist import files
from raydist.bucket.check import check_bucket
from raydist.cluster.connect import ray_session
from raydist.cluster.ray_output import ray_output_to
from raydist.cluster.resources import cpus_per_worker_here, sized_here
from raydist.cluster.session import Session
from raydist.errors import JobError, RunChanged, Stopped
from raydist.folder import Kind, RunFolder
from raydist.job.identity import differences
from raydist.job.load import kept_yaml, load_job
from raydist.job.schema import Job, Scaling
from raydist.job.segments import Segment, begun, extended, job_at, refusals, segments_of
from raydist.redact import redact
from raydist.storage import Storage
from raydist.track.listener import Listener
from raydist.training.phases import Phases

T = TypeVar("T")


def folder_of(job: Job) -> RunFolder:
    return RunFolder(Storage(job.storage).path / job.name)


def began_with(folder: RunFolder) -> Job:
    """The resolved job in the folder. Raises RunError if it is damaged."""
    folder.check_job()
    try:
        return load_job(folder.job_file)
    except JobError as error:
        raise folder.damaged_job(str(error)) from error


class Life:
    """A run or a sweep in the hands of this driver."""

    def __init__(self, job: Job, kind: Kind, listener: Listener) -> None:
        self.job, self.kind, self.listener = job, kind, listener
        self.folder = folder_of(job)
        self.phases = Phases("plan")
        self.ray = Session()
        self.why = ""
        """Why this driver begins; known once its folder is held."""
        self._changed: list[str] = []
        self._segments: tuple[Segment, ...] | None = None
        """Where the job extends the run: all that it has from now on."""
        self._old: Scaling | None = None
        self._known = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder is this driver's, and the listener shows what happens, until the block ends.

        Raises RunError where the folder is not raydist's, RunBusy while another driver lives, RunChanged
        where the job differs from that of the checkpoints (or trials) in it. Then nothing was changed.
        What a disk refuses in the block is raised as StorageError.
        """
        with files.storage_watched(self.folder.path):
            check_bucket(self.folder.path.parent)
            self.folder.refresh().check_place(self.kind)
            self._require_finished()
            with self.listener, self.folder.lease():
                self.folder.refresh(exactly=True).mark(self.kind)
                self._compare()
                self.why = _why(self.folder.status(), new=self._changed != [] or not self._known)
                if self._segments is not None and self.folder.status().get("state") == "finished":
                    self.why = f"extended by {self._segments[-1].steps:,} steps"
                yield

    def require_held(self) -> None:
        """Raises RunBusy where another driver has taken the run, as only in a bucket it can."""
        self.folder.require_writer()

    @property
    def finished(self) -> bool:
        """Whether this very job has ended here already. Known once the folder is held."""
        return (
            self._known
            and not self._changed
            and self._segments is None
            and self.folder.status().get("state") == "finished"
        )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """From planning to the end, which status.json says, however it comes; signals ask to stop."""
        with at_the_end(self._write_status, self.folder.path), self._stop_signals():
            if self._changed:
                self.folder.clear()
            if self._segments is not None:
                self._keep_segments(self._segments)  # before the job: without it they do not count
            self._keep_threads()
            self.folder.reserve_status()
            self.folder.take_back_stop()
            self.folder.write_job(kept_yaml(self.job))
            self.folder.set_status("planning")
            self.listener.phase("checking the job")
            yield

    @contextmanager
    def on_ray(self, address: str | None) -> Iterator[None]:
        """On the cluster at `address`, or on a Ray of this process's own with room for the job's workers."""
        job = sized_here(self.job) if address is None else self.job
        self.phases.begin("start")
        self.listener.phase("joining the cluster" if address else "starting Ray")
        with (
            ray_output_to(self.folder.ray_output),
            ray_session(job.scaling.most, cpus_per_worker_here(job), address) as self.ray,
            self._stop_signals(),  # again: joining a cluster puts Ray's own handlers in place
        ):
            yield

    def preparing(self) -> None:
        self.folder.set_status("preparing")
        self.phases.begin("prepare")

    def prepare(self, work: Callable[[], T]) -> T:
        """`work`, which makes token logs: again, and only what is missing then, where Ray was lost."""
        restarts = self.job.scaling.max_failures
        return self.ray.do_again(work, "preparation", restarts, self.listener.message)

    def training(self) -> None:
        self.folder.set_status("training")

    def stop_if_asked(self) -> None:
        """Raises Stopped."""
        if self.folder.stop_asked():
            raise self.stopped()

    def stopped(self) -> Stopped:
        name = self.folder.path.name
        fix = "submit the job again to go on"
        return Stopped(f"run {name} was stopped", where=str(self.folder.path), fix=fix)

    # --- the job that the folder began with --------------------------------------------------------

    def _compare(self) -> None:
        """Raises RunChanged where what is trained here already was trained under another job."""
        if not self.folder.job_file.exists():
            return
        old, self._known = began_with(self.folder), True
        self._old = old.scaling
        self._changed = differences(old, self.job)
        if self.kind == "sweep" and _search(old) != _search(self.job):
            self._changed.append("tune.search")
        if not self._changed:
            return
        listed = "\n  ".join(self._changed)
        if self.kind == "run" and self.folder.committed() and (old.train.extend or self.job.train.extend):
            self._segments = self._extended(old)
        if self._segments is not None:
            self._changed = []
            return
        if self.kind == "run" and self.folder.committed():
            raise RunChanged(
                f"the job differs from the run {self.job.name} that it would resume:\n  {listed}",
                where=str(self.folder.path),
                why="its checkpoints were trained under the old job",
                fix="give the job a new name, undo the change, or remove the run's folder",
            )
        if self.kind == "sweep" and self.folder.trials_file.exists():
            raise RunChanged(
                f"the job differs from the sweep {self.job.name} that it would go on with:\n  {listed}",
                where=str(self.folder.path),
                why="its trials would not be comparable",
                fix="give the sweep a new name, undo the change, or remove the sweep's folder",
            )

    def _require_finished(self) -> None:
        """Raises RunChanged for an extension of a run that has not been trained."""
        if self.job.train.extend and not (self.folder.job_file.exists() and self.folder.committed()):
            raise RunChanged(
                f"train.extend goes on with a finished run, and {self.job.name} is none",
                where=str(self.folder.path),
                why="there is no checkpoint of it",
                fix="train it without train.extend first",
            )

    def _extended(self, old: Job) -> tuple[Segment, ...] | None:
        """The run's segments under the new job; None where that does not ask for an extension.

        An extension in the old job may change as long as no step of it is committed.
        Raises RunChanged where the run cannot go on so.
        """
        newest = self.folder.committed_steps()[-1]
        pins = self.folder.data().get("pins", {})
        if old.train.epochs is not None:
            raise self._no_extension(differences(old, self.job))
        known = begun(segments_of(pins, old) or extended(old)[:1], newest)
        was = job_at(old, known)
        changed = differences(was, self.job)
        if changed and len(self.job.train.extend) <= len(was.train.extend):
            return None
        if changed and (wrong := refusals(was, self.job, newest)):
            raise self._no_extension(wrong)
        return extended(self.job, known)

    def _no_extension(self, wrong: list[str]) -> RunChanged:
        listed = "\n  ".join(wrong)
        return RunChanged(
            f"the job is no extension of the run {self.job.name}:\n  {listed}",
            where=str(self.folder.path),
            why="train.extend goes on with what was trained; only weights and new sources may differ",
            fix="undo these changes, or give the job a new name",
        )

    def _keep_segments(self, segments: tuple[Segment, ...]) -> None:
        """With the pins of the sources that the run read so far: those of others may be new ones now."""
        pins = self.folder.data().get("pins")
        if pins is None:
            raise RunChanged(
                f"the run {self.job.name} cannot be extended",
                where=str(self.folder.data_file),
                why="it does not say which token logs the run was trained on",
                fix="restore data.json from a copy",
            )
        newest = self.folder.committed_steps()[-1]
        read = begun(segments, newest)[-1].weights
        logs = {name: pin for name, pin in pins["logs"].items() if name in read}
        kept = {"segments": [each.to_json() for each in segments]} if len(segments) > 1 else {}
        others = {name: value for name, value in pins.items() if name != "segments"}
        self.folder.add_data(pins={**others, "logs": logs, **kept})

    def _keep_threads(self) -> None:
        """Those of a run that began before its folder kept them: then they stood in its job as a number."""
        if self._old is None or "threads" in self.folder.data() or not self.folder.committed():
            return
        by_ray = any(self.folder.ray.glob("attempt-*/*"))  # torchrun sets the threads of its ranks itself
        if by_ray and isinstance(self._old.cpus_per_worker, int):
            self.folder.keep_threads(self._old.most, self._old.cpus_per_worker)

    # --- how it ends -------------------------------------------------------------------------------

    def _write_status(self, error: BaseException | None) -> None:
        state = state_after(error)
        more = {"error": redact(str(error)) or type(error).__name__, "kind": type(error).__name__}
        try:
            self.folder.set_status(state, **more if state == "failed" else {})
        except OSError as refused:
            if error is not None:
                text = f"the run's status cannot be written ({refused}); raydist status calls it interrupted"
                self.listener.message(text)
            raise
        if state != "failed":
            self.folder.release_status()

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for a checkpoint and a clean end; a second one ends at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.folder.stop_flag.exists():
                raise KeyboardInterrupt
            self.folder.ask_to_stop()
            if self.folder.status().get("state") != "training":
                raise self.stopped()
            self.listener.message("stopping after a checkpoint; once more to stop at once")

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals; `raydist stop` still works
            return
        with _handling(signal.SIGTERM, ask), _handling(signal.SIGINT, ask):
            yield


def keep_collator(job: Job, folder: RunFolder) -> None:
    """Raises RunChanged where the collator's source is not the one that the run's checkpoints began with.

    The source is no part of the job, and a run that went on with another one would not be the same.
    """
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


def _why(status: dict[str, Any], *, new: bool) -> str:
    """Why a run is submitted whose folder has this status. new: nothing of what is there is gone on with."""
    if new or not status:
        return "first submission"
    state = status.get("state")
    if state == "failed":
        return f"submitted again after it failed: {str(status.get('error')).splitlines()[0]}"
    return f"submitted again after {'it was stopped' if state == 'stopped' else 'its driver was killed'}"


def state_after(error: BaseException | None) -> str:
    """How work ended that raised `error`, or nothing: finished, stopped or failed."""
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, Stopped) else "failed"


@contextmanager
def at_the_end(conclude: Callable[[BaseException | None], None], folder: Path) -> Iterator[None]:
    """Call `conclude` when the block ends, with what it raised, if anything; that goes on being raised.

    What a disk refused in the block is raised, and given to `conclude`, as StorageError; what it refuses to
    `conclude` then changes nothing. folder: that of the run.
    """
    try:
        with files.storage_watched(folder):
            yield
    except BaseException as error:
        try:
            conclude(error)
        except OSError as refused:
            if files.storage_error(refused, folder) is None:
                raise
        raise
    conclude(None)


def _search(job: Job) -> object:
    return job.tune and job.tune.search


@contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
