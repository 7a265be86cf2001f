"""Settings that hold for all tests, and one Ray for those that need it."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before anything imports Ray, torch or matplotlib: workers started by a test inherit these.
os.environ.update(
    {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.pop("RAY_ADDRESS", None)

# Ray asks for the state of an actor at the address that the last `ray start` of this machine left in its
# temporary folder. When that cluster is gone, every training attempt waits 12 s for it before it ends.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

# A shell's `make test &` and nohup have it ignored, and the programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNIT = Path(__file__).parent / "unit"
OBJECT_STORE_BYTES = 200 * 2**20


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu`, as `make test-gpu` says, is for DeepSpeed on the GPU; it takes one device per process."""
    if config.option.markexpr == "gpu":
        os.environ["DS_ACCELERATOR"] = "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors in unit tests; elsewhere Ray and what stands on it warn of their own affairs."""
    items.sort(key=lambda item: item.path.name in LAST)
    for item in items:
        if not item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.filterwarnings("default"))


LAST = ("test_follow.py", "test_samples.py", "test_embedded.py")
"""Integration tests for the process that has run the unit tests, so that both processes end together."""


class TwoKinds(LoadScopeScheduling):
    """For `make test -n 2`: one process runs the integration tests, which mostly wait and share one Ray.

    The other one runs the unit tests and then the LAST, a file at a time, so that the fixtures of a file are
    made once.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "integration" if "integration/" in file and not file.endswith(LAST) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return TwoKinds(config, log)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with the real model and text, or skip."""
    folder = os.environ.get("RAYDIST_REAL")
    if not folder:
        pytest.skip("RAYDIST_REAL does not name a folder with the real model and text")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """An embedded Ray of three CPUs, shared by the integration tests and shut down at their end."""
    import ray

    from raydist.cluster.connect import on_loopback

    with on_loopback():
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()
