"""Join a Ray cluster, or start an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from raydist.cluster.resources import CORES, cores
from raydist.cluster.session import Session
from raydist.cluster.temporary import ray_folder
from raydist.cluster.token import ensure_token
from raydist.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_config import JobConfig

OBJECT_STORE_BYTES = 256 * 2**20
"""Size for an embedded Ray. Tokens never pass through the object store, so this is enough."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else each worker of a `uv run` driver starts uv again
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray Train takes one report per poll; its default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor, 200 MB, that nothing here asks
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray ends a process in which a call waits so long for its GCS: by default 60 s, also where that one is
    # gone and the process works on another Ray by then. Session notices a lost one earlier.
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(24 * 3600),
}


SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""A Python process with this puts neither its script's folder nor the working folder on sys.path."""

NO_TOKEN = (
    "couldn't find an authentication token",
    "cannot be opened or is empty",
    "no authentication token was found",
    "Authentication required",
)
"""Ray's messages if there is no token; all its other messages about tokens are about a wrong one."""


def ray_address(given: str | None, in_job: str | None = None) -> str | None:
    """The cluster's address: `given` (command line), else RAY_ADDRESS, else the job's; None: embedded."""
    return given or os.environ.get("RAY_ADDRESS") or in_job


def set_environment() -> None:
    """Set Ray's environment variables. Some, as RAY_AUTH_MODE, have an effect only before Ray is imported."""
    for name, value in ENVIRONMENT.items():
        if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
            os.environ.setdefault(name, value)


@contextmanager
def ray_session(num_workers: int, cpus_per_worker: int, address: str | None = None) -> Iterator[Session]:
    """A Ray to run on: this process's if it has one, else the cluster at `address`, else an embedded one.

    The connection made here is closed at the end. If `address` does not answer, ClusterError is raised and no
    embedded Ray is started.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield Session()
        return
    with _own_temporary_folder() if address is None else nullcontext():
        if address is not None:
            _join(address)
            session = Session()
        else:
            session = Session(lambda: _start_embedded(num_workers * cpus_per_worker))
            _start_embedded(num_workers * cpus_per_worker)
        try:
            yield session
        finally:
            session.close()


@contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """RAY_TMPDIR names a folder of this process's own, unless the user has named one.

    In the shared one Ray Train would find the address that `ray start` left there, and would wait 12 s for
    that cluster at the end of each attempt.
    """
    if "RAY_TMPDIR" in os.environ:
        yield
        return
    with ray_folder() as folder:
        os.environ["RAY_TMPDIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["RAY_TMPDIR"]


def start_ray(address: str | None = None) -> None:
    """As `ray_session` finds or starts one, and left running: its results are read later."""
    set_environment()
    import ray

    if not ray.is_initialized():
        _join(address) if address is not None else _start_embedded(1)


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, job_config=_job_config(), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, OSError, ray.exceptions.AuthenticationError) as error:
        fix = "start it, correct the address, or unset RAY_ADDRESS to run on an embedded local Ray"
        raise connection_error(address, error, fix) from error


def connection_error(address: str, error: BaseException | None, fix: str) -> ClusterError:
    """The error for a failed connection: no token, a wrong token, or no answer (then with `fix`)."""
    messages, cause = "", error
    while cause is not None:
        messages, cause = f"{messages} {type(cause).__name__}: {cause}", cause.__cause__ or cause.__context__
    if "AuthenticationError" not in messages:
        why = f"{type(error).__name__}: {error}"
        return ClusterError(f"no Ray cluster answers at {address}", why=why, fix=fix)
    places = "RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
    if any(message in messages for message in NO_TOKEN):
        return ClusterError(
            f"this machine has no token for the cluster at {address}",
            fix=f"put the head's into {places}; or set RAY_AUTH_MODE=disabled for a cluster without one",
        )
    return ClusterError(
        f"the cluster at {address} does not accept the token of this machine",
        where=places,
        fix="use the head's token, which `ray get-auth-token` prints there",
    )


def _start_embedded(training_cpus: int) -> None:
    """Start a Ray with one CPU more than training reserves, so that tokenizing always finds one."""
    import ray

    shared_memory = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory
    roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 1.2 * OBJECT_STORE_BYTES
    ensure_token()
    with on_loopback(), _safe_path():
        ray.init(
            address="local",
            job_config=_job_config(),
            num_cpus=max(os.cpu_count() or 1, training_cpus + 1),
            resources={CORES: cores()},
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _plasma_directory=None if roomy else os.environ.get("TMPDIR", "/tmp"),  # noqa: S108
        )


def _job_config() -> JobConfig:
    """Ray's description of this driver, without its working folder and its script's.

    Ray would put both first on the sys.path of every worker, where a pandas.py in one of them would run in
    place of pandas. The modules that a job names are found by raydist.job.functions.
    """
    from ray.job_config import JobConfig

    class WithoutFolders(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:  # then Ray sends no folders
            return True

    return WithoutFolders()


@contextmanager
def _safe_path() -> Iterator[None]:
    """A Ray that is started in this block gives SAFE_PATH to its workers and to what these start."""
    before = {name: os.environ.get(name) for name in SAFE_PATH}
    os.environ.update(SAFE_PATH)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started in this block listens on 127.0.0.1 only: its GCS, raylet, agents and workers.

    ray.init(_node_ip_address="127.0.0.1") does not achieve that: Ray replaces the address by the machine's
    own, and its processes then listen on every interface. On macOS and Windows, where a cluster has no other
    machines, Ray uses loopback; this constant makes it do the same here. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    sets it too, but only before Ray is imported, and also for a cluster that this process joins later.

    The rendezvous store of torch.distributed does not belong to Ray. While a run trains, its first worker
    serves it on every interface; neither torch's environment variables nor Ray Train can change that.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
