"""Send a job to a cluster, with this version of raydist and the user's modules that the job names."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from raydist import files
from raydist.cluster.connect import ENVIRONMENT, SAFE_PATH
from raydist.cluster.doctor import require_healthy
from raydist.cluster.remote import RUN, connect, follow_job, jobs_of, run_of, send
from raydist.errors import JobError
from raydist.job.functions import named_functions
from raydist.job.load import job_yaml
from raydist.job.schema import Job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_WAIT_SECONDS = "120"
"""Between Ray's SIGTERM and its SIGKILL: time for a checkpoint. Ray's own default is 3 s."""


def submit_and_follow(job: Job, address: str, say: Callable[[str], None], command: str = "train") -> int:
    """Submit `raydist COMMAND job.yaml`, or attach to this run if it is running already.

    Returns the exit status of its driver. Ctrl-C detaches; the job goes on. Raises ClusterError with every
    problem that `raydist doctor` finds at `address`, JobError for a module that this machine does not have.
    """
    job, modules = with_absolute_paths(job, address), own_modules(job)
    client = connect(address)
    submission = _running(client, job)
    if submission is None:
        require_healthy(address, job)
        submission = _submit(client, job, modules, command)
    say(f"job {submission} on {address}")
    try:
        return follow_job(client, submission, say)
    except KeyboardInterrupt:
        at = f"{run_key(job)} --address {address}"
        say(f"detached; the job goes on.  raydist logs --follow {at}  attaches,  raydist stop {at}  stops it")
        return 0


def _running(client: JobSubmissionClient, job: Job) -> str | None:
    """The submission id of this run's job, if it is running."""
    for details in jobs_of(client):
        if run_of(details) == run_key(job) and not details.status.is_terminal():
            return details.submission_id
    return None


def run_key(job: Job) -> str:
    return os.path.normpath(f"{job.storage}/{job.name}")


def _submit(client: JobSubmissionClient, job: Job, modules: list[Path], command: str) -> str:
    """Submit the job. The cluster has the libraries and its own copy of the token, which is not sent."""
    import raydist

    package = str(Path(raydist.__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        files.write_text(Path(folder) / "job.yaml", job_yaml(job))
        for path in modules:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, Path(folder) / path.name)
        mode = os.environ.get(
            "RAY_AUTH_MODE", ENVIRONMENT["RAY_AUTH_MODE"]
        )  # `disabled` must apply there too
        variables = {**ENVIRONMENT, "RAY_AUTH_MODE": mode, "RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_SECONDS}
        variables |= SAFE_PATH
        runtime_env = {"working_dir": folder, "py_modules": [package], "env_vars": variables}
        return send(
            client,
            entrypoint=f"python -m raydist {command} job.yaml",
            runtime_env=runtime_env,
            submission_id=f"raydist-{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            metadata={RUN: run_key(job)},
        )


def own_modules(job: Job) -> list[Path]:
    """Files and packages that the job names as module:function, without those that are installed."""
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    modules: list[Path] = []
    for where, function in named_functions(job):
        path = _find_module(function.partition(":")[0].partition(".")[0], function, where)
        if path is not None and installed.isdisjoint(path.resolve().parents) and path not in modules:
            modules.append(path)
    return modules


def _find_module(name: str, function: str, where: str) -> Path | None:
    """The module's file or folder, from sys.path or the working folder; None for a built-in module."""
    cwd = str(Path.cwd())
    spec = PathFinder.find_spec(name, [*sys.path, cwd])
    if spec is None and name not in sys.builtin_module_names:
        raise JobError(
            f"no module {name} is found for {function}",
            where=where,
            why=f"it is neither in {cwd} nor on Python's path, so it cannot be sent to the cluster",
            fix=f"run the command in the folder that holds {name}.py, or add that to PYTHONPATH",
        )
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    return Path(next(iter(folders))) if folders else Path(spec.origin or "")


def with_absolute_paths(job: Job, address: str) -> Job:
    """Relative paths mean this machine's folder: true of a cluster on this machine, refused elsewhere."""
    values = job.model_dump(mode="json")
    relative: list[str] = []

    def absolute(key: str, path: str) -> str:
        if not _is_relative(path):
            return path
        relative.append(f"{key}: {path}")
        return str(Path(path).absolute())

    values["storage"] = absolute("storage", values["storage"])
    for section in ("corpus", "eval"):
        for name, source in values[section]["sources"].items():
            key, given = f"{section}.sources.{name}.path", source["path"]
            source["path"] = (
                absolute(key, given) if isinstance(given, str) else [absolute(key, p) for p in given]
            )
    if not relative:
        return job
    if urlparse(address).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise JobError(
            "relative paths in a job for a remote cluster: " + ", ".join(relative),
            why="no two hosts have the same working folder",
            fix="give absolute paths on shared storage, or URIs",
        )
    for key in ("base", "tokenizer"):
        named = values["model"][key]  # a hub id unless there is such a folder
        if isinstance(named, str) and Path(named).is_dir() and _is_relative(named):
            values["model"][key] = str(Path(named).absolute())
    return Job.model_validate(values)


def _is_relative(path: str) -> bool:
    return "://" not in path and not path.startswith(("/", "~", "${"))
