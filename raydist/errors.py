"""Every error that raydist raises on purpose.

    RaydistError               exit code 1
    ├── JobError               2   the job is wrong; the message lists every problem
    ├── CorpusError            3   the source files cannot be used
    │   ├── BadRecords         3   unreadable records or files, and `on_error: fail`
    │   └── EmptyCorpus        3   there is nothing to train on
    ├── LogError               4   a token log is incomplete, damaged or not the one expected
    ├── ModelError             5   the model or tokenizer cannot be used
    ├── RunError               6   the run folder does not allow the command
    │   ├── RunChanged         6   the job differs from that of the existing run of this name
    │   ├── RunBusy            6   another process is writing to this run
    │   └── CheckpointError    6   a checkpoint does not fit the run, or is damaged
    ├── TrainingError          7   training failed; carries the worker's traceback
    │   ├── WorkerLost         7   a worker died; the next attempt goes on from the last checkpoint
    │   └── OutOfMemory        7   a worker's micro batch did not fit; the next attempt takes half
    ├── ClusterError           8   the cluster does not answer or is too small
    │   └── ClusterLost        8   Ray itself ended while it was needed
    ├── StorageError           9   a disk is full or read-only, a quota is used up, or a permission is missing
    └── Stopped                130 stopped on request, after a checkpoint

An error says what is wrong, where, why it matters and what to do, and shows no secret. All can be pickled,
since they are passed between processes.
"""

from __future__ import annotations

from raydist.places import with_uris
from raydist.redact import redact


class RaydistError(Exception):
    """Base of all errors; `str()` gives the four parts, a line each.

    what: the problem, with the actual value.  where: file, row or YAML path.
    why: the reason it is refused.  fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = map(redact, map(with_uris, (what, where, why, fix)))
        super().__init__(self.what)

    def __str__(self) -> str:
        parts = [("where", self.where), ("why", self.why), ("do", self.fix)]
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in parts if text)])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def first_line(error: BaseException) -> str:
    """What a library's exception says in its first line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rebuild(kind: type[RaydistError], what: str, where: str, why: str, fix: str) -> RaydistError:
    return kind(what, where=where, why=why, fix=fix)


class JobError(RaydistError):
    exit_code = 2


class CorpusError(RaydistError):
    exit_code = 3


class BadRecords(CorpusError):
    pass


class EmptyCorpus(CorpusError):
    pass


class LogError(RaydistError):
    exit_code = 4


class ModelError(RaydistError):
    exit_code = 5


class RunError(RaydistError):
    exit_code = 6


class RunChanged(RunError):
    pass


class RunBusy(RunError):
    pass


class CheckpointError(RunError):
    pass


class TrainingError(RaydistError):
    exit_code = 7


class WorkerLost(TrainingError):
    pass


class OutOfMemory(TrainingError):
    pass


class ClusterError(RaydistError):
    exit_code = 8


class ClusterLost(ClusterError):
    pass


class StorageError(RaydistError):
    exit_code = 9


class Stopped(RaydistError):
    exit_code = 130
