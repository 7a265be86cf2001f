"""The run's folder: the names in it, its status, and the lock that keeps it to one writer.

Whatever reads a run reads this folder and nothing else. What counts as done is a file written last.
A folder with the marker `.raydist` belongs to a run or a sweep. raydist writes into no other folder, and
removes or replaces only what it wrote itself, by the names that stand here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from raydist import files
from raydist.bucket import appended, lease, mirror
from raydist.bucket.mirror import is_remote, place_of
from raydist.bucket.objects import Exists
from raydist.errors import RunBusy, RunError, StorageError
from raydist.places import shown, uri_of
from raydist.sealed import append_sealed, is_sealed, read_sealed, sealed, sealed_line, write_sealed
from raydist.storage import MLFLOW_ARTIFACTS, MLFLOW_DATABASE, TOKENIZERS, TOKENS, Storage

LIVE = ("planning", "preparing", "training")
STATES = (*LIVE, "finished", "failed", "stopped")
DAMAGED = "damaged"
"""The state of a run whose status cannot be read. It can be resumed, which writes a new one."""

Kind = Literal["run", "sweep"]
MARKER = ".raydist"
COMMIT = "COMMIT.json"
"""In a checkpoint's folder, written last: what makes it count."""

PINS = ("tokenizer", "logs", "eval_logs")
"""What a run is pinned to, in data.json."""

RESTORE_DATA = (
    "restore it from a copy; or remove it: then the token logs are found by the source files as they are now,"
    " and refused if they are not those that the run began with"
)

OLD_JOB = "job.yaml"
"""What the resolved job was called before runs had a marker."""

_CHECKSUM_LINE = "# checksum: "
"""Starts the resolved job's first line, which ends with the xxh3-128 of all that follows it."""

LOCKS = (".lease", ".writer")
SPARE = ".status.spare"
SPARE_BYTES = 8192
"""Room for a status on a full disk; its error is cut to an eighth of so many characters there."""
CONTENTS = (
    "raydist-job.yaml", "status.json", "progress.json", "data.json", "metrics.jsonl", "ledger.jsonl",
    "damaged-ledger.jsonl", "stop", "report.html", "trials.jsonl", "optuna.jsonl", "best.yaml", "sweep.html",
    "mlflow.json", "wandb.json",
    "metrics.jsonl.parts", "ledger.jsonl.parts", MLFLOW_DATABASE, MLFLOW_ARTIFACTS,
    "checkpoints", "ray", "model", "model.json", ".model.tmp", "export", "tensorboard", "wandb",
)  # fmt: skip
"""All that raydist writes into a run's or a sweep's folder, except the marker, the locks and SPARE."""

SMALL = {
    MARKER, "raydist-job.yaml", "status.json", "progress.json", "data.json", "trials.jsonl", "optuna.jsonl",
    "best.yaml", "mlflow.json", "wandb.json", "model.json", "report.html",
}  # fmt: skip
"""Files of a run in a bucket that each node has, as they are there."""
LOOK_SECONDS = 2.0
"""Between two looks at a flag in a bucket."""
PROGRESS_SECONDS = 5.0
"""Between two reports of progress to a bucket."""


class RunFolder:
    """Paths and records of one run; making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remote = uri_of(path) is not None
        """Whether the run lives in a bucket, and `path` is this node's mirror of it."""
        self._leases: list[lease.Lease] = []
        self._looked: dict[Path, float] = {}
        self._progress_sent = 0.0
        self.marker = path / MARKER
        self.status_file = path / "status.json"
        self.progress_file = path / "progress.json"
        self._spare = path / SPARE
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.ledger_file = path / "ledger.jsonl"
        self.damaged_ledger = path / "damaged-ledger.jsonl"
        self.checkpoints = path / "checkpoints"
        self.ray = path / "ray"
        self.ray_output = self.ray / "driver.log"
        self.model = path / "model"
        self._model_record = path / "model.json"
        self.merged = path / "export" / "merged"
        self.report = path / "report.html"
        self.stop_flag = path / "stop"
        self.trials_file = path / "trials.jsonl"
        self.optuna_journal = path / "optuna.jsonl"
        self.best_file = path / "best.yaml"
        self.sweep_page = path / "sweep.html"
        self.mlflow_pin = path / "mlflow.json"
        self.wandb_pin = path / "wandb.json"
        self.wandb = path / "wandb"
        self.tensorboard = path / "tensorboard"

    @property
    def job_file(self) -> Path:
        """The resolved job; under its old name in a run that was made before runs had a marker."""
        old = self.path / OLD_JOB
        return old if self._is_unmarked() else self.path / "raydist-job.yaml"

    def __reduce__(self) -> tuple[object, ...]:
        """A copy in another process holds no lease."""
        return RunFolder, (self.path,)

    # --- in a bucket -------------------------------------------------------------------------------

    def refresh(self, *, exactly: bool = False) -> RunFolder:
        """Have the run's records here as they are in the bucket; returns itself. See mirror.pull."""
        if not self.remote:
            return self
        mirror.pull_files(self.path, SMALL, exactly=exactly)
        mirror.pull(self.checkpoints, lambda name: name.endswith(f"/{COMMIT}"), exactly=exactly)
        appended.join(self.metrics_file)
        appended.join(self.ledger_file)
        return self

    def download(self, target: Path, *, checkpoints: bool = False) -> tuple[int, int]:
        """Copy the run out of its bucket: how many files and bytes. checkpoints: those too.

        Raises RunError where there is nothing to copy, or `target` is not empty.
        """
        if not self.remote:
            raise RunError(f"{self.path} is a folder already", fix="copy it as any other folder")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunError(
                f"{target} is not empty",
                why="nothing that is there is overwritten",
                fix="name a new folder",
            )
        left_out = {*LOCKS, self.ray.name, *(() if checkpoints else (self.checkpoints.name,))}
        sizes = []
        for name in mirror.names_below(self.path):
            top, _, rest = name.partition("/")
            if top not in left_out and not top.endswith(".parts") and uri_of(self.path / name):
                part = re.sub(r"^attempt-\d+/", "", rest.partition("/")[2])
                in_checkpoint = top == self.checkpoints.name and part
                local = f"{top}/{rest.partition('/')[0]}/{part}" if in_checkpoint else name
                sizes.append(mirror.copy(self.path / name, target / local))
        for path in (self.metrics_file, self.ledger_file):
            if path.exists():
                files.write_bytes(target / path.name, path.read_bytes())
                sizes.append(path.stat().st_size)
        return len(sizes), sum(sizes)

    def flush(self) -> None:
        """What was recorded so far is in the bucket when this returns."""
        if self.remote:
            appended.flush(self.metrics_file)

    def require_writer(self) -> None:
        """Raises RunBusy where another process has taken the run meanwhile."""
        for held in self._leases:
            held.require()

    # --- whose folder it is ------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run or a sweep is here."""
        return self.marker.is_file() or self._is_unmarked()

    def check_place(self, kind: Kind) -> None:
        """Raises RunError where this is not the folder of a run (or sweep) and cannot become one.

        A folder that is missing or empty can. Nothing is written here.
        """
        if self.marker.is_file():
            marked = self._marked()
            if marked != kind:
                raise RunError(
                    f"{self.path.name} is the name of a {marked}, and a {kind} was asked for",
                    where=str(self.path),
                    why=f"a folder holds one {marked} or one {kind}",
                    fix=f"give the {kind} another name",
                )
            return
        foreign = self._foreign()
        if foreign and not (self._is_unmarked() and foreign == [OLD_JOB]):
            shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise RunError(
                f"the folder of the {kind}, {self.path}, holds what raydist did not write: {shown}",
                where="name and storage: together they name the folder",
                why="raydist writes only into folders of its own, and nothing here was touched",
                fix=f"give the {kind} another name or storage, or move these files away",
            )

    def check_marker(self) -> None:
        """Raises RunError where the marker is damaged."""
        if self.marker.is_file():
            self._marked()

    def _marked(self) -> str:
        fix = 'if the folder is a run\'s, write {"kind": "run"} into it; else give the job another name'
        kind = str(read_sealed(self.marker, RunError, fix, keys=("kind",))["kind"])
        if kind not in ("run", "sweep"):
            why = f"it is that of a {kind}, which raydist does not know"
            raise RunError(f"{self.marker.name} is damaged", where=str(self.marker), why=why, fix=fix)
        return kind

    def mark(self, kind: Kind) -> None:
        """Make the folder that of a run (or sweep). Raises RunError as `check_place` does."""
        self.check_place(kind)
        if not self.marker.is_file():
            write_sealed(self.marker, {"kind": kind, "format": 1})

    def clear(self) -> None:
        """Remove the run, and nothing that raydist did not write. For the holder of the lease, once marked.

        Raises RunError, having removed nothing, where one of its names is a link, which raydist never makes.
        """
        assert self.marker.is_file(), self.path
        there = [path for name in CONTENTS if (path := self.path / name).exists() or path.is_symlink()]
        if links := [path.name for path in there if path.is_symlink()]:
            raise RunError(
                f"{', '.join(links)} in the run's folder is a link, which raydist did not make",
                where=str(self.path),
                why="what another job left here would be removed, and the link may lead anywhere",
                fix="remove the link, or give the job a new name",
            )
        for path in there:
            files.remove_folder(path) if path.is_dir() else files.remove(path)
        for name in set(mirror.names_in(self.path)) & set(CONTENTS):
            files.remove(self.path / name)
            files.remove_folder(self.path / name)
        if self.remote:
            appended.forget(self.metrics_file)
            appended.forget(self.ledger_file)

    def write_job(self, text: str) -> None:
        """The resolved job, as YAML. It is written with a checksum."""
        old = self.path / OLD_JOB if self._is_unmarked() else None
        sealed = f"{_CHECKSUM_LINE}{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}"
        files.write_text(self.path / "raydist-job.yaml", sealed)
        if old is not None:
            old.unlink()

    def check_job(self) -> None:
        """Raises RunError where the resolved job is not what was written. One without a checksum passes."""
        first, _, text = self.job_file.read_bytes().partition(b"\n")
        start = _CHECKSUM_LINE.encode()
        if first.startswith(start) and first != start + xxhash.xxh3_128_hexdigest(text).encode():
            raise self.damaged_job("its content does not match its checksum")

    def damaged_job(self, why: str) -> RunError:
        file = self.job_file
        return RunError(
            f"{file.name}, the job that {self.path.name} began with, is damaged",
            where=str(file),
            why=why,
            fix="restore it from a copy, or put the job file in its place that the run was submitted with",
        )

    def _is_unmarked(self) -> bool:
        """Whether a run is here that was made before runs had a marker."""
        needed = (OLD_JOB, "status.json", ".lease")
        return not (self.path / "raydist-job.yaml").exists() and all(
            (self.path / name).is_file() for name in needed
        )

    def _foreign(self) -> list[str]:
        """Names in the folder that raydist does not write there, in order."""
        if not self.path.is_dir() and not self.remote:
            return [self.path.name] if self.path.exists() or self.path.is_symlink() else []
        ours = {*CONTENTS, *LOCKS, MARKER, SPARE}
        here = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        names = sorted({*here, *mirror.names_in(self.path)})
        ours = {*ours, *filter(mirror.is_own, names)} if self.remote else ours
        return [name for name in names if name not in ours and not fnmatch(name, ".*.tmp")]

    # --- status and data ---------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """{} for a run that was never started; {state: DAMAGED, error} where the file is damaged."""
        if not self.status_file.exists():
            return {}
        fix = "resume the run, which writes a new one"
        try:
            status = read_sealed(self.status_file, RunError, fix, keys=("state",))
            if "since" in status:
                datetime.fromisoformat(status["since"])
            if status["state"] in STATES:
                return status
            why = f"no state {status['state']!r} is known"
        except RunError as error:
            why = error.why
        except (TypeError, ValueError) as error:
            why = str(error)
        return {"state": DAMAGED, "error": f"{self.status_file.name} is damaged: {why}; {fix}"}

    def state(self) -> str:
        """One of STATES or DAMAGED; `interrupted` where the status names work and no driver lives."""
        state = str(self.status().get("state", "planning"))
        return "interrupted" if state in LIVE and not self.driver() else state

    def driver(self) -> str:
        """The process that holds the run, as "process 12 on host"; empty while none does."""
        path = self.path / ".lease"
        if self.remote:
            return lease.holder(path)
        return path.read_text(errors="replace") if path.exists() and _is_held(path) else ""

    def set_status(self, state: str, **more: Any) -> None:
        """A full disk takes it as well, once `reserve_status` has kept room for it there."""
        assert state in STATES, state
        since = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "since": since, **more}
        try:
            write_sealed(self.status_file, status)
        except OSError as error:
            if error.errno not in files.FULL or not self._spare.exists():
                raise
            # in JSON a character takes up to 6 bytes
            short = {key: str(value)[: SPARE_BYTES // 8] for key, value in status.items()}
            files.write_over(self._spare, self.status_file, files.json_bytes(sealed(short)))

    def reserve_status(self) -> None:
        """Keep room for one status. Random bytes, since a file system may store zeros without taking room."""
        if not self._spare.exists() and not self.remote:
            files.write_bytes(self._spare, os.urandom(SPARE_BYTES))

    def release_status(self) -> None:
        self._spare.unlink(missing_ok=True)

    def progress(self, attempt: int) -> tuple[str, int, int] | None:
        """The phase that rank 0 of this attempt is in, and done and total of it; None if not known.

        total is 0 where it is not known.
        """
        try:
            now = files.read_json(self.progress_file)
            known = now.get("attempt") == attempt and now["phase"] is not None
            return (str(now["phase"]), int(now["done"]), int(now["total"])) if known else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is for people; a damaged one says nothing

    def write_progress(self, attempt: int, phase: str | None, done: int, total: int) -> None:
        """Not flushed to disk, since nothing is resumed from it."""
        now = {"attempt": attempt, "phase": phase, "done": done, "total": total}
        temporary = self.path / ".progress.json.tmp"
        temporary.write_bytes(orjson.dumps(now))
        temporary.replace(self.progress_file)
        if self.remote and time.monotonic() - self._progress_sent >= PROGRESS_SECONDS:
            self._progress_sent = time.monotonic()
            with contextlib.suppress(StorageError):  # it is for people
                mirror.publish(self.progress_file)

    def data(self) -> dict[str, Any]:
        """What is known of the run's tokens, and the fingerprints of the token logs it is pinned to.

        {} where nothing is known yet. Raises RunError where the file is damaged.
        """
        return self._read_data() if self.data_file.exists() else {}

    def _read_data(self) -> dict[str, Any]:
        data = read_sealed(self.data_file, RunError, RESTORE_DATA)
        known = is_sealed(self.data_file) or {"pins", "sources", "audit", "collator"} & data.keys()
        pins = data.get("pins", {key: {} for key in PINS})
        if not known or not (isinstance(pins, dict) and all(isinstance(pins.get(key), dict) for key in PINS)):
            why = "it does not hold what raydist writes there"
            raise RunError(
                f"{self.data_file.name} is damaged", where=str(self.data_file), why=why, fix=RESTORE_DATA
            )
        return data

    def add_data(self, **more: Any) -> None:
        write_sealed(self.data_file, {**self.data(), **more})

    def threads(self, num_workers: int) -> int | None:
        """Threads of each worker in the attempts before, with so many workers; None for the first."""
        kept = self.data().get("threads")
        return int(kept["each"]) if kept and kept["workers"] == num_workers else None

    def keep_threads(self, num_workers: int, each: int) -> None:
        self.add_data(threads={"workers": num_workers, "each": each})

    def append_metric(self, record: dict[str, Any]) -> None:
        """In a bucket: within `writer`, and there after a few seconds or `flush`."""
        if self.remote:
            appended.append(self.metrics_file, sealed_line(record))
        else:
            append_sealed(self.metrics_file, record)

    def append_trial(self, record: dict[str, Any]) -> None:
        """To a sweep's trials, on disk or in the bucket when this returns. For the holder of the lease."""
        append_sealed(self.trials_file, record, flush=True)
        mirror.publish(self.trials_file)

    # --- what one process asks of another ----------------------------------------------------------

    def look(self, path: Path) -> bool:
        """Whether a file is there that another process may write; in a bucket, whether it was seconds ago."""
        if self.remote and time.monotonic() - self._looked.get(path, -LOOK_SECONDS) >= LOOK_SECONDS:
            with contextlib.suppress(StorageError):  # the next look may succeed
                mirror.pull_file(path)
            self._looked[path] = time.monotonic()
        return path.exists()

    def ask_to_stop(self) -> None:
        files.write_bytes(self.stop_flag, b"")

    def stop_asked(self) -> bool:
        return self.look(self.stop_flag)

    def take_back_stop(self) -> None:
        files.remove(self.stop_flag)

    @property
    def has_model(self) -> bool:
        """In a bucket: there, and not necessarily on this node."""
        return self.model.exists() or (self.remote and self._model_record.exists())

    def fetch_model(self) -> None:
        """Have the model on this node, where the run is in a bucket."""
        mirror.pull(self.model)

    # --- the model ---------------------------------------------------------------------------------

    def write_model_record(self, measured: dict[str, Any]) -> None:
        """measured: size and checksum (see files.measure) of each file of the model, by name."""
        write_sealed(self._model_record, {"files": measured})

    def model_record(self) -> dict[str, Any]:
        """What `write_model_record` was given; {} for a run of an older version, or without a model.

        Raises RunError where the record is damaged.
        """
        if not self._model_record.exists():
            return {}
        fix = "restore it from a copy; or remove it: then the model's files cannot be verified"
        record = read_sealed(self._model_record, RunError, fix, keys=("files",))
        return dict(record["files"])

    # --- checkpoints and attempts ------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self, *, in_bucket: bool = False) -> list[int]:
        """Steps of all folders of checkpoints, whole or not, in order; in_bucket: also those only there."""
        there = {path.name for path in self.checkpoints.glob("step-????????")}
        there |= set(mirror.names_in(self.checkpoints)) if in_bucket else set()
        names = (name.removeprefix("step-") for name in there if name.startswith("step-"))
        return sorted(int(name) for name in names if name.isdecimal())

    def committed_steps(self) -> list[int]:
        """Steps of the checkpoints that have a COMMIT.json, in order."""
        return [step for step in self.checkpoint_steps() if (self.checkpoint(step) / COMMIT).exists()]

    def committed(self) -> bool:
        return bool(self.committed_steps())

    def append_ledger(self, line: str, number: int) -> None:
        """The line is on disk, or in the bucket, when this returns. number: of lines before it.

        Raises RunBusy where another writer has added a line meanwhile, as only in a bucket it can.
        """
        if self.remote:
            self.require_writer()
            with taken_by_another(self.ledger_file):
                appended.append_part(self.ledger_file, line.encode() + b"\n", number)
        else:
            files.append_line(self.ledger_file, line.encode(), flush=True)

    def rewrite_ledger(self, lines: Sequence[bytes]) -> None:
        """Replace what is there."""
        content = b"".join(line + b"\n" for line in lines)
        if self.remote:
            appended.rewrite(self.ledger_file, content)
        else:
            files.write_bytes(self.ledger_file, content)

    def attempt(self, number: int) -> Path:
        """Ray Train's own folder of an attempt."""
        return self.ray / f"attempt-{number}"

    def ranks(self, attempt: int) -> Path:
        """Signs of life of an attempt's ranks, and their stacks once they hang."""
        return self.attempt(attempt) / "ranks"

    def resize_flag(self, attempt: int) -> Path:
        """Asks an attempt for a checkpoint and an end, so that the run goes on with more workers."""
        return self.attempt(attempt) / "resize"

    def placement_group(self, attempt: int) -> Path:
        """The id of the group that Ray reserves for an attempt's workers."""
        return self.attempt(attempt) / "placement-group"

    def next_attempt(self) -> int:
        """Attempts count from 1 over the whole life of the run."""
        there = [*(path.name for path in self.ray.glob("attempt-*")), *mirror.names_in(self.ray)]
        names = (name.removeprefix("attempt-") for name in there)
        return max((int(name) for name in names if name.isdecimal()), default=0) + 1

    # --- locks -------------------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run for this driver. Raises RunBusy, naming the holder, while another one lives."""
        seconds = 1  # somebody may be looking at `driver`
        with exclusive(self.path / ".lease", seconds), self._leased(".lease", seconds):
            yield

    @contextmanager
    def writer(self, attempt: int) -> Iterator[None]:
        """Hold the run's records for this attempt's rank 0.

        A driver can die before its workers do: the next attempt waits here until the last writer is
        gone, so that two attempts never write checkpoints or records side by side. One on a host that
        is cut off from the network is gone when its collective times out, 300 s after the cut.
        """
        with exclusive(self.path / ".writer", wait_seconds=280), self._leased(".writer", wait_seconds=280):
            if not self.remote:
                yield
                return
            with appended.appending(self.metrics_file, f"{attempt:06d}"):
                yield

    @contextmanager
    def _leased(self, name: str, wait_seconds: float) -> Iterator[None]:
        """In a bucket: hold this lease of the run."""
        if not self.remote:
            yield
            return
        with lease.held(self.path / name, wait_seconds) as held:
            self._leases.append(held)
            try:
                yield
            finally:
                self._leases.remove(held)


@contextmanager
def exclusive(path: Path, wait_seconds: float) -> Iterator[None]:
    """Lock `path` for this process. The kernel frees it the moment the process is dead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        deadline = time.monotonic() + wait_seconds
        while not _locked(lock.fileno()):
            if time.monotonic() >= deadline:
                raise _busy(path)
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _locked(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    with path.open() as lock:
        return not _locked(lock.fileno(), fcntl.LOCK_SH)


def _busy(path: Path) -> RunBusy:
    return RunBusy(
        f"another process is writing the run {path.parent.name}",
        where=f"{path.parent}, held by {path.read_text(errors='replace') or 'a process that just started'}",
        why="two writers would mix their checkpoints",
        fix=f"wait for it, or stop it: raydist stop {path.parent}",
    )


@contextmanager
def taken_by_another(path: Path) -> Iterator[None]:
    """Raises RunBusy where another process wrote to the run meanwhile, which the block found out."""
    try:
        yield
    except Exists as error:
        raise RunBusy(
            f"another process is writing the run {path.parent.name}",
            where=shown(path),
            why=f"it wrote {error} meanwhile; of two writers one goes on",
            fix="nothing, where the other one is an attempt at the same run; else find out who it is",
        ) from error


def runs_in(storage: str) -> list[RunFolder]:
    """Runs and sweeps, by name."""
    path = Storage(storage).path
    names = {*(each.name for each in path.glob("*")), *mirror.names_in(path)}
    folders = (RunFolder(path / name).refresh() for name in sorted(names - {TOKENS, TOKENIZERS}))
    return [folder for folder in folders if folder.exists()]


def find_run(run: str | Path, storage: str = "runs") -> RunFolder:
    """The folder of RUN, given as a folder, a URI, or a name within `storage`."""
    known_as = str(run)
    paths = [place_of(known_as)] if is_remote(known_as) else [Path(run), Storage(storage).path / run]
    for path in paths:
        if (folder := RunFolder(path).refresh()).exists():
            return folder
    if is_remote(known_as):
        storage = known_as.rstrip("/").rpartition("/")[0]
    known = [folder.path.name for folder in runs_in(storage)]
    raise RunError(
        f"no run {run}",
        where=f"{' and '.join(shown(path) for path in paths)}: no run is there",
        fix=f"runs in {storage}: {', '.join(known) or 'none'}; or name another folder with --storage",
    )
