"""Ranks as forks of one process that has imported torch and the rest already.

A rank that starts as a program of its own imports for several seconds of CPU before it trains for one, and
the tests start a hundred of them. Here one server per test session imports, and forks a child per rank; the
child has its own environment and calls what `python -m tests.rank` calls. The server runs no
torch operation and has one thread: what a fork copies is then whole. It ends when the test session does,
however that ends, and its children end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "tests.rank",
    "raydist.model.adapter",
    "raydist.model.attention.choose",
    "raydist.parallel.ddp",
    "raydist.corpus.log",
    "raydist.feed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
    "deepspeed",
)
SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # else importing pyarrow starts a thread
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a process that has asked CUDA itself can fork no user of it
}
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class Rank:
    """A forked rank, with what the tests use of subprocess.Popen."""

    def __init__(self, path: Path, env: Mapping[str, str]) -> None:
        request = json.dumps({"path": str(path), "env": dict(env), "cwd": str(Path.cwd())})
        self._status, status = socket.socketpair()
        self._errors, self._written = tempfile.TemporaryFile(), b""  # noqa: SIM115 - closed when it has ended
        with status:
            socket.send_fds(server(), [request.encode()], [self._errors.fileno(), status.fileno()])
        self.pid = int(server().recv(64) or -1)
        assert self.pid > 0, "the fork server has ended; its error stands above"
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._outcome(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._outcome(timeout) is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, bytes]:
        self.wait(timeout)
        return None, self._written

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _outcome(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            with self._status, self._errors:  # without a word the server has died, and its children with it
                self.returncode = int(self._status.recv(64) or -signal.SIGKILL)
                self._errors.seek(0)
                self._written = self._errors.read()
        return self.returncode


@functools.cache
def server() -> socket.socket:
    """The test session's end of the connection; when it closes, the server ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, **SETTINGS},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest
        )

    def stop() -> None:
        ours.close()
        process.wait()

    atexit.register(stop)
    return ours


# --- in the server


def main(requests: socket.socket) -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a module that the fork server imports starts a thread"
    gc.freeze()  # a child that collects garbage need not touch, and so copy, all of it
    path = serve(requests)
    if path is None:
        os._exit(0)  # at once
    sys.exit(sys.modules["tests.rank"].main(path))


def serve(requests: socket.socket) -> str | None:
    """Fork a child per request and report how it ended. Returns in the child, with the path of its spec.

    Children are waited for by file descriptors: a SIGCHLD that arrives just before the server blocks would
    be handled with the next request only, and the test that waits for that child makes none.
    """
    children: dict[int, tuple[int, socket.socket]] = {}
    own = os.getpid()
    while True:
        for ready in select.select([requests.fileno(), *children], [], [])[0]:
            if ready in children:
                report(ready, *children.pop(ready))
                continue
            message, fds, _, _ = socket.recv_fds(requests, 2**20, 2)
            if not message:
                return None
            pid = os.fork()
            if pid == 0:
                return become_rank(json.loads(message), fds[0], own)
            os.close(fds[0])
            children[os.pidfd_open(pid)] = pid, socket.socket(fileno=fds[1])
            with contextlib.suppress(BrokenPipeError):  # then the next request is none
                requests.sendall(str(pid).encode())


def report(pidfd: int, pid: int, status: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with status, contextlib.suppress(BrokenPipeError):
        status.sendall(str(code).encode())


def become_rank(request: dict[str, Any], errors: int, parent: int) -> str:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(errors, sys.stderr.fileno())
    faulthandler.enable()  # to the errors, where it is by SIGABRT that a rank ends
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    path: str = request["path"]
    return path


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
