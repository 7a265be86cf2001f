"""Send a job to a cluster through Ray's Jobs API, follow its log, and bring back its exit status."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from raydist import files
from raydist.cluster.connect import ENVIRONMENT, set_environment
from raydist.errors import ClusterError, JobError
from raydist.job.load import job_yaml
from raydist.job.schema import Job

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

READY_SECONDS = 60
STOP_WAIT_SECONDS = "120"
"""Between Ray's SIGTERM and its SIGKILL: time for a checkpoint. Ray's own default is 3 s."""


def submit_and_follow(job: Job, address: str, say: Callable[[str], None]) -> int:
    """Submit `job`, or attach to it where it is running already; returns the exit status of its driver.

    Ctrl-C detaches; the job goes on. Raises ClusterError where nothing answers at `address`.
    """
    client = _connect(address)
    submission = _running(client, job) or _submit(client, _absolute(job, address))
    say(f"job {submission} on {address}")
    try:
        asyncio.run(_follow(client, submission, say))
    except KeyboardInterrupt:
        say(f"detached; the job goes on. Submit it again to follow it, or: ray job stop {submission}")
        return 0
    return _exit_status(client, submission, say)


def _connect(address: str) -> JobSubmissionClient:
    set_environment()
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}",
            why=f"{type(error).__name__}: {error}",
            fix="give the dashboard's address, such as http://head:8265, and its token in RAY_AUTH_TOKEN",
        ) from error
    return client


def _running(client: JobSubmissionClient, job: Job) -> str | None:
    """The submission that is running this very run."""
    for details in client.list_jobs():
        mine = (details.metadata or {}).get("raydist_run") == _run_key(job)
        if mine and details.submission_id and not details.status.is_terminal():
            return str(details.submission_id)
    return None


def _run_key(job: Job) -> str:
    return f"{job.storage}/{job.name}"


def _submit(client: JobSubmissionClient, job: Job) -> str:
    """Ships the resolved job and this version of raydist; the cluster has the libraries."""
    import raydist

    package = str(Path(raydist.__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        files.write_text(Path(folder) / "job.yaml", job_yaml(job))
        runtime_env: dict[str, Any] = {
            "working_dir": folder,
            "py_modules": [package],
            "env_vars": {**ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_SECONDS},
        }
        return _once_ready(
            lambda: client.submit_job(
                entrypoint="python -m raydist train job.yaml",
                runtime_env=runtime_env,
                submission_id=f"raydist-{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                metadata={"raydist_run": _run_key(job)},
            )
        )


def _once_ready(submit: Callable[[], str]) -> str:
    """A head that has just started has no agent for jobs yet."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return str(submit())
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError("the cluster did not take the job", why=str(error)) from error
            time.sleep(1)


def _absolute(job: Job, address: str) -> Job:
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


async def _follow(client: JobSubmissionClient, submission: str, say: Callable[[str], None]) -> None:
    """Print the log from its start; after a broken connection, go on behind what was printed."""
    printed = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(submission):
                seen += len(text)
                if seen > printed:
                    say(text[max(0, len(text) - (seen - printed)) :].rstrip("\n"))
                    printed = seen
        except RuntimeError:
            await asyncio.sleep(1)
        if client.get_job_status(submission).is_terminal():
            return


def _exit_status(client: JobSubmissionClient, submission: str, say: Callable[[str], None]) -> int:
    details: JobDetails = client.get_job_info(submission)
    code = details.driver_exit_code
    if code is None:
        code = 0 if details.status.name == "SUCCEEDED" else 1
    if code != 0:
        say(f"job {submission}: {details.status.name}, exit status {code}. {details.message or ''}")
    return code % 256
