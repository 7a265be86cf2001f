"""The jobs of a cluster, through Ray's Jobs API: connect, find the job of a run, follow its output.

The metadata of a job names its run, `<storage>/<name>`; a job is found by it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

from raydist.cluster.connect import connection_error, set_environment
from raydist.errors import ClusterError, RunError, Stopped

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
RUN = "raydist_run"
CONNECT_SECONDS = 10.0
READY_SECONDS = 60.0
SILENCE_SECONDS = 60.0
"""A connection without any data for so long may be dead, and is replaced."""
LOST_SECONDS = 120.0
"""How long to wait for a cluster that does not answer."""
GOES_ON = "the job may go on; to follow it: raydist logs RUN --follow --address URL"


def connect(address: str) -> JobSubmissionClient:
    """A client for the cluster. Raises ClusterError: no answer, no token, a wrong token."""
    set_environment()
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to `address`
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
        raise connection_error(address, error, fix) from error
    return client


def _reach(address: str) -> None:
    """Raises OSError if the host does not answer; Ray's own requests would wait for it without end."""
    url = urlparse(address)
    if url.scheme in ("http", "https") and url.hostname:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=CONNECT_SECONDS).close()


def send(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job and return its id. Waits for a head that has just started: it has no agent for jobs yet.

    Raises ClusterError if the cluster refuses the job or the connection breaks.
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
                fix="repeat the command: it attaches to the job if the cluster has received it",
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
    """The newest job of `run`: a name, <storage>/<name>, or the id of the job."""
    jobs = jobs_of(client)
    for job in jobs:
        if run in (run_of(job), Path(run_of(job)).name, job.submission_id):
            return job
    raise RunError(
        f"no run {run} among the jobs of {client.get_address()}",
        fix=f"its runs: {', '.join(run_of(job) for job in jobs) or 'none'}",
    )


def follow_job(client: JobSubmissionClient, submission: str, say: Callable[[str], None]) -> int:
    """Print the output of the job, from start to end; returns the exit status of its driver.

    When the connection breaks, it goes on after the last printed line. Raises ClusterError when the cluster
    is silent for LOST_SECONDS, or does not know the job any more. Ctrl-C detaches: KeyboardInterrupt.
    """
    job = run_async(_follow(client, submission, OutputPrinter(say)))
    code = exit_status(job)
    if code != 0:
        say(f"job {submission}: {job.status.name}, exit status {code}. {_message(job)}")
    return code


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run; in a thread of its own where this one has a running loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            outcome.set_exception(error)

    threading.Thread(target=run, name="follow", daemon=True).start()
    return outcome.result()


def exit_status(job: JobDetails) -> int:
    """Exit status of the job's driver; 0 while it runs."""
    if job.driver_exit_code is not None:
        return int(job.driver_exit_code) % 256
    return {"FAILED": 1, "STOPPED": Stopped.exit_code}.get(job.status.name, 0)


def job_summary(job: JobDetails) -> dict[str, Any]:
    """What the cluster knows about a run without access to its storage."""
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
    """The job's message without the end of its output, which Ray appends: it has been printed."""
    return (job.message or "").partition(", last available logs")[0]


class OutputPrinter:
    """Prints each line of a job's output once, although every new connection sends it from its start."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._unfinished_line = say, ""
        self._n_received = self._n_taken = 0  # characters: on this connection; in all

    def restart(self) -> None:
        """A new connection sends the output from its start."""
        self._n_received = 0

    def take(self, text: str) -> None:
        self._n_received += len(text)
        n_new = max(0, self._n_received - self._n_taken)
        new = text[len(text) - n_new :]
        lines, newline, self._unfinished_line = (self._unfinished_line + new).rpartition("\n")
        self._n_taken += n_new
        if newline:
            self._say(lines)

    def end(self) -> None:
        if self._unfinished_line:
            self._say(self._unfinished_line)


async def _follow(client: JobSubmissionClient, submission: str, printer: OutputPrinter) -> JobDetails:
    import aiohttp

    while True:
        printer.restart()
        stream = client.tail_job_logs(submission).__aiter__()
        try:
            while True:
                printer.take(await asyncio.wait_for(anext(stream), SILENCE_SECONDS))
        except (StopAsyncIteration, TimeoutError, RuntimeError, OSError, aiohttp.ClientError):
            job: JobDetails = await ask_until_answered(client, client.get_job_info, submission)
        if job.status.is_terminal():
            printer.end()
            return job
        await asyncio.sleep(1)


async def ask_until_answered(
    client: JobSubmissionClient, ask: Callable[[str], T], submission: str, fix: str = GOES_ON
) -> T:
    """`ask(submission)`, repeated until the cluster answers.

    Raises ClusterError when the cluster is silent for LOST_SECONDS (the advice is `fix`), or does not know
    the job any more.
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
                    why="its head was restarted, and jobs end with their cluster",
                    fix="submit the run again: it goes on from its last checkpoint",
                ) from error
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"lost contact with the cluster at {client.get_address()} for {LOST_SECONDS:.0f} s",
                    why=f"{type(error).__name__}: {error}",
                    fix=fix,
                ) from error
        await asyncio.sleep(2)
