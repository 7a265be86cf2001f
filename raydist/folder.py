"""The run's folder: the names in it, its status, and the lock that keeps it to one writer.

Whatever reads a run reads this folder and nothing else. What counts as done is a file written last.
A folder with the marker `.raydist` belongs to a run or a sweep. raydist writes into no other folder, and
removes or replaces only what it wrote itself, by the names that stand here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash

from raydist import files
from raydist.errors import RunBusy, RunError
from raydist.sealed import append_sealed, is_sealed, read_sealed, sealed, write_sealed

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
    "checkpoints", "ray", "model", "model.json", ".model.tmp", "export", "tensorboard", "wandb",
)  # fmt: skip
"""All that raydist writes into a run's or a sweep's folder, except the marker, the locks and SPARE."""


class RunFolder:
    """Paths and records of one run; making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
            shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        if not self.path.is_dir():
            return [self.path.name] if self.path.exists() or self.path.is_symlink() else []
        ours = {*CONTENTS, *LOCKS, MARKER, SPARE}
        names = sorted(path.name for path in self.path.iterdir())
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
        lease = self.path / ".lease"
        return lease.read_text(errors="replace") if lease.exists() and _is_held(lease) else ""

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
        if not self._spare.exists():
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
        append_sealed(self.metrics_file, record)

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

    def checkpoint_steps(self) -> list[int]:
        """Steps of all folders of checkpoints, whole or not, in order."""
        names = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-????????"))
        return sorted(int(name) for name in names if name.isdecimal())

    def committed_steps(self) -> list[int]:
        """Steps of the checkpoints that have a COMMIT.json, in order."""
        return [step for step in self.checkpoint_steps() if (self.checkpoint(step) / COMMIT).exists()]

    def committed(self) -> bool:
        return bool(self.committed_steps())

    def append_ledger(self, line: str) -> None:
        """The line is on disk when this returns."""
        files.append_line(self.ledger_file, line.encode(), flush=True)

    def attempt(self, number: int) -> Path:
        """Ray Train's own folder of an attempt."""
        return self.ray / f"attempt-{number}"

    def ranks(self, attempt: int) -> Path:
        """Signs of life of an attempt's ranks, and their stacks once they hang."""
        return self.attempt(attempt) / "ranks"

    def placement_group(self, attempt: int) -> Path:
        """The id of the group that Ray reserves for an attempt's workers."""
        return self.attempt(attempt) / "placement-group"

    def next_attempt(self) -> int:
        """Attempts count from 1 over the whole life of the run."""
        names = (path.name.removeprefix("attempt-") for path in self.ray.glob("attempt-*"))
        return max((int(name) for name in names if name.isdecimal()), default=0) + 1

    # --- locks -------------------------------------------------------------------------------------

    def lease(self) -> AbstractContextManager[None]:
        """Hold the run for this driver. Raises RunBusy, naming the holder, while another one lives."""
        return exclusive(self.path / ".lease", wait_seconds=1)  # somebody may be looking at `driver`

    def writer(self) -> AbstractContextManager[None]:
        """Hold the run's records for this attempt's rank 0.

        A driver can die before its workers do: the next attempt waits here until the last writer is
        gone, so that two attempts never write checkpoints or records side by side. One on a host that
        is cut off from the network is gone when its collective times out, 300 s after the cut.
        """
        return exclusive(self.path / ".writer", wait_seconds=280)


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


def runs_in(storage: str) -> list[RunFolder]:
    """Runs and sweeps, by name."""
    folders = (RunFolder(path) for path in sorted(Path(storage).expanduser().glob("*")))
    return [folder for folder in folders if folder.exists()]


def find_run(run: str | Path, storage: str = "runs") -> RunFolder:
    """The folder of RUN, given as a folder or as a name within `storage`."""
    for path in (Path(run), Path(storage) / run):
        if (folder := RunFolder(path)).exists():
            return folder
    known = [folder.path.name for folder in runs_in(storage)]
    raise RunError(
        f"no run {run}",
        where=f"neither {run} nor {Path(storage) / run} is the folder of a run",
        fix=f"runs in {storage}: {', '.join(known) or 'none'}; or name another folder with --storage",
    )
