"""Join a Ray cluster, or start an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raydist.cluster.token import ensure_token
from raydist.errors import ClusterError

OBJECT_STORE_BYTES = 256 * 2**20
"""Tokens never travel through the object store, so that an embedded Ray needs little of it."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker of a `uv run` driver starts uv again
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray Train takes one report per poll; its default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


NO_TOKEN = (
    "couldn't find an authentication token",
    "cannot be opened or is empty",
    "no authentication token was found",
    "Authentication required",
)
"""How Ray says that there is none; whatever else it says of tokens is about a wrong one."""


def ray_address(asked: str | None, in_job: str | None = None) -> str | None:
    """The cluster's address: the command line's, else RAY_ADDRESS, else the job's; None for embedded."""
    return asked or os.environ.get("RAY_ADDRESS") or in_job


def set_environment() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported: set later it would contradict what Ray has read."""
    for name, value in ENVIRONMENT.items():
        if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
            os.environ.setdefault(name, value)


@contextmanager
def ray_session(num_workers: int, cpus_per_worker: int, address: str | None = None) -> Iterator[None]:
    """A Ray to run on: this process's if it has one, else the cluster at `address`, else an embedded one.

    Whoever started it shuts it down. An address that does not answer is an error, never an embedded Ray.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    if address is not None:
        _join(address)
    else:
        _embed(num_workers * cpus_per_worker)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, OSError, ray.exceptions.AuthenticationError) as error:
        fix = "start it, mend the address, or unset RAY_ADDRESS to run on an embedded local Ray"
        raise no_way_in(address, error, fix) from error


def no_way_in(address: str, error: BaseException | None, fix: str) -> ClusterError:
    """What kept us out of the cluster at `address`: no token, a wrong one, or, with `fix`, nobody there."""
    told, cause = "", error
    while cause is not None:
        told, cause = f"{told} {type(cause).__name__}: {cause}", cause.__cause__ or cause.__context__
    if "AuthenticationError" not in told:
        why = f"{type(error).__name__}: {error}"
        return ClusterError(f"no Ray cluster answers at {address}", why=why, fix=fix)
    places = "RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
    if any(said in told for said in NO_TOKEN):
        return ClusterError(
            f"no token is here for the cluster at {address}",
            fix=f"put the head's into {places}; or set RAY_AUTH_MODE=disabled for a cluster without one",
        )
    return ClusterError(
        f"the cluster at {address} does not accept the token that is given here",
        where=places,
        fix="take the head's, which `ray get-auth-token` prints there",
    )


def _embed(training_cpus: int) -> None:
    """One CPU more than training reserves: tokenizing must always find one.

    In a temporary folder of its own: in the shared one Ray Train finds the address that `ray start` left
    behind, and waits 12 s for that cluster at the end of each attempt.
    """
    import ray

    if "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    shared_memory = Path("/dev/shm")  # noqa: S108 - where Linux keeps shared memory
    roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 1.2 * OBJECT_STORE_BYTES
    ensure_token()
    with on_loopback():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, training_cpus + 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _plasma_directory=None if roomy else os.environ.get("TMPDIR", "/tmp"),  # noqa: S108
        )


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray started within listens on 127.0.0.1 alone: its GCS, raylet, agents and workers all do.

    ray.init(_node_ip_address="127.0.0.1") does not do it: Ray replaces that address by the machine's own,
    and all of its processes then listen on every interface. On macOS and Windows, where it takes no other
    machine into a cluster, it keeps to loopback, by this constant. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 sets
    it too, but only before Ray is imported, and for a cluster that this process joins later as well.

    The rendezvous store of torch.distributed is not Ray's: while a run trains, its first worker has it on
    every interface, and neither torch's environment variables nor Ray Train can bind it elsewhere.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
