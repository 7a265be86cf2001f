"""The jobs of a cluster through Ray's Jobs API: connect, find the job of a run, follow its log.

A job carries its run as metadata, `<storage>/<name>`, by which it is found again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

from raydist.cluster.connect import no_way_in, set_environment
from raydist.errors import ClusterError, RunError, Stopped

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
RUN = "raydist_run"
CONNECT_SECONDS = 10.0
READY_SECONDS = 60.0
SILENCE_SECONDS = 60.0
"""A connection that said nothing for so long may be dead: another is made."""
LOST_SECONDS = 120.0
"""How long a cluster that does not answer is waited for."""
GOES_ON = "the job may go on; to follow it: raydist logs RUN --follow --address URL"


def connect(address: str) -> JobSubmissionClient:
    """Raises ClusterError: no such address, no token, a wrong token."""
    set_environment()
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would let them win over `address`
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in (
        "_private.runtime_env.packaging",
        "dashboard.modules.dashboard_sdk",
        "dashboard.modules.job.sdk",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        _reach(address)
        client = JobSubmissionClient(address)
        client.list_jobs()
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        fix = "give the address of the cluster's dashboard, such as http://head:8265"
        raise no_way_in(address, error, fix) from error
    return client


def _reach(address: str) -> None:
    """Raises OSError. Ray's own requests wait without end for a host that does not answer."""
    url = urlparse(address)
    if url.scheme in ("http", "https") and url.hostname:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()


def send(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job and give its id. A head that has just started has no agent for jobs yet.

    Raises ClusterError: it does not take the job, or the connection breaks meanwhile.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ClusterError("the cluster did not take the job", why=str(error)) from error
            time.sleep(1)
        except OSError as error:
            raise ClusterError(
                f"lost contact with the cluster at {client.get_address()} while the job was sent",
                why=f"{type(error).__name__}: {error}",
                fix="give the command again: it attaches to the job if the cluster has taken it",
            ) from error


def jobs_of(client: JobSubmissionClient) -> list[JobDetails]:
    """The newest job of each run, newest first."""
    ours = [job for job in client.list_jobs() if RUN in (job.metadata or {}) and job.submission_id]
    newest: dict[str, JobDetails] = {}
    for job in sorted(ours, key=lambda job: job.start_time or 0, reverse=True):
        newest.setdefault(run_of(job), job)
    return list(newest.values())


def run_of(job: JobDetails) -> str:
    return (job.metadata or {})[RUN]


def find_job(client: JobSubmissionClient, run: str) -> JobDetails:
    """The newest job of RUN: a name, <storage>/<name>, or the job's own id."""
    jobs = jobs_of(client)
    for job in jobs:
        if run in (run_of(job), Path(run_of(job)).name, job.submission_id):
            return job
    raise RunError(
        f"no run {run} among the jobs of {client.get_address()}",
        fix=f"its runs: {', '.join(run_of(job) for job in jobs) or 'none'}",
    )


def follow_job(client: JobSubmissionClient, submission: str, say: Callable[[str], None]) -> int:
    """Print the job's log from its start to its end; returns the exit status of its driver.

    Where the connection breaks it goes on behind what was printed. Raises ClusterError when the cluster
    is silent for LOST_SECONDS, or does not know the job any more. Ctrl-C detaches: KeyboardInterrupt.
    """
    job = asyncio.run(_follow(client, submission, Log(say)))
    code = exit_status(job)
    if code != 0:
        say(f"job {submission}: {job.status.name}, exit status {code}. {_message(job)}")
    return code


def exit_status(job: JobDetails) -> int:
    """Of the job's driver; 0 while it runs."""
    if job.driver_exit_code is not None:
        return int(job.driver_exit_code) % 256
    return {"FAILED": 1, "STOPPED": Stopped.exit_code}.get(job.status.name, 0)


def job_summary(job: JobDetails) -> dict[str, Any]:
    """What the cluster knows of a run without its storage."""
    since = datetime.fromtimestamp((job.end_time or job.start_time or 0) / 1000, UTC)
    return {
        "name": Path(run_of(job)).name,
        "state": job.status.name.lower(),
        "since": since.isoformat(timespec="seconds"),
        "error": _message(job) if job.status.name == "FAILED" else None,
        "folder": run_of(job),
        "job": job.submission_id,
    }


def _message(job: JobDetails) -> str:
    """Without the log's end that Ray appends: it is printed from the log."""
    return (job.message or "").partition(", last available logs")[0]


class Log:
    """Says each line once, however often the log is sent from its start."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.said, self.seen, self.rest = say, 0, 0, ""

    def take(self, text: str) -> None:
        self.seen += len(text)
        new = max(0, self.seen - self.said)
        lines, newline, self.rest = (self.rest + text[len(text) - new :]).rpartition("\n")
        self.said += new
        if newline:
            self.say(lines)

    def end(self) -> None:
        if self.rest:
            self.say(self.rest)


async def _follow(client: JobSubmissionClient, submission: str, log: Log) -> JobDetails:
    import aiohttp

    while True:
        log.seen = 0
        stream = client.tail_job_logs(submission).__aiter__()
        try:
            while True:
                log.take(await asyncio.wait_for(anext(stream), SILENCE_SECONDS))
        except (StopAsyncIteration, TimeoutError, RuntimeError, OSError, aiohttp.ClientError):
            job: JobDetails = await patiently(client, client.get_job_info, submission)
        if job.status.is_terminal():
            log.end()
            return job
        await asyncio.sleep(1)


async def patiently(
    client: JobSubmissionClient, ask: Callable[[str], T], submission: str, fix: str = GOES_ON
) -> T:
    """What `ask` gives of a job, asked again while the cluster does not answer.

    Raises ClusterError, with `fix`, when it is silent for LOST_SECONDS or does not know the job any more.
    """
    from ray.exceptions import AuthenticationError

    deadline = time.monotonic() + LOST_SECONDS
    while True:
        try:
            _reach(client.get_address())
            return ask(submission)
        except (OSError, RuntimeError, AuthenticationError) as error:
            if "status code 404" in str(error):
                raise ClusterError(
                    f"the cluster at {client.get_address()} does not know the job {submission} any more",
                    why="its head was started anew, and jobs end with their cluster",
                    fix="submit the run again: it goes on from its last checkpoint",
                ) from error
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"lost contact with the cluster at {client.get_address()} for {LOST_SECONDS:.0f} s",
                    why=f"{type(error).__name__}: {error}",
                    fix=fix,
                ) from error
        await asyncio.sleep(2)
