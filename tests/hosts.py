"""Several hosts on one machine: network namespaces on one switch, each with Ray processes of its own.

    with Hosts("head", "one", "two", "laptop") as hosts:
        hosts.start_head(hosts["head"], num_cpus=1)
        hosts.start_worker(hosts["one"], num_cpus=2)
        hosts.wait_for_nodes(2)
        hosts["laptop"].run("raydist", "submit", "job.yaml", "--address", hosts.dashboard)
        hosts["one"].kill()

The hosts share files and process numbers, as hosts with a shared file system do; what they do not share
is the network: each has its own loopback, ports and address. With `private`, a folder is another one on each
host, by its own mounts: a disk of its own. Nothing is changed outside the namespaces.
Needs root and iproute2: `can_run()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
OBJECT_STORE_BYTES = 100 * 2**20
GCS_PORT, DASHBOARD_PORT = 6379, 8265
READY_SECONDS = 60.0

ASK = """
import pathlib, sys, urllib.request
token = pathlib.Path(sys.argv[2]).read_text()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"})
print(urllib.request.urlopen(request, timeout=5).read().decode())
"""

QUICK = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""An unplugged host counts as dead after about 20 s, not 60. One whose processes were killed is noticed
at once by its closed connections."""


def can_run() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (iproute2)"
    try:
        with Hosts("probe"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


def ip(*arguments: str) -> str:
    made = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return made.stdout


class Host:
    """One namespace. `environment` is that of every process started here."""

    def __init__(
        self, namespace: str, address: str, environment: dict[str, str], private: tuple[Path, Path] | None
    ) -> None:
        self.namespace, self.address, self.environment = namespace, address, environment
        self.private = private

    def command(self, *arguments: str | Path) -> list[str]:
        """Programs beside this Python go first, so that `ray` and `raydist` are this checkout's."""
        program, *rest = map(str, arguments)
        own = PROGRAMS / program
        if program in ("python", "raydist"):
            rest = ["-m", "raydist", *rest] if program == "raydist" else rest
            own = Path(sys.executable)
        command = [str(own) if own.exists() else program, *rest]
        if self.private is not None:  # `ip netns exec` gives a process mounts of its own
            mount = 'mount --bind "$0" "$1" && shift && exec "$@"'
            command = ["sh", "-c", mount, *map(str, self.private), *command]
        return ["ip", "netns", "exec", self.namespace, *command]

    def popen(
        self, *arguments: str | Path, env: dict[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[str]:
        """Standard output and error come together, as text, unless `more` says otherwise."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {**self.environment, **(env or {})}
        return subprocess.Popen(self.command(*arguments), env=environment, **{**streams, **more})

    def run(
        self, *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 120, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """To its end. An exit status other than 0 is the caller's to judge."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
        environment = {**self.environment, **(env or {})}
        return subprocess.run(
            self.command(*arguments), env=environment, timeout=timeout, **{**streams, **more}
        )

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL to every process of this host, until none is left."""
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def unplug(self) -> None:
        """Nothing goes in or out any more; the processes live on."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")

    def plug(self) -> None:
        ip("-n", self.namespace, "link", "set", "eth0", "up")


class Hosts:
    """Hosts by name, on a network of their own; on leaving, their processes and namespaces are gone.

    private: a folder that is another one on each host.
    """

    def __init__(self, *names: str, private: Path | None = None) -> None:
        self.private = private
        self.key = secrets.token_hex(3)
        self.subnet = f"10.{20 + secrets.randbelow(200)}.{secrets.randbelow(250)}"
        self.folder = Path(tempfile.mkdtemp(prefix="h"))  # short: a socket's path has at most 107 characters
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.switch = f"rd{self.key}-switch"
        self.by_name = {name: self._host(name, place) for place, name in enumerate(names, 1)}
        self.head: Host | None = None
        self.started: list[subprocess.Popen[str]] = []

    def _host(self, name: str, place: int) -> Host:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            **QUICK,
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",  # where Ray finds its python
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(self.folder / name),
        }
        own = None
        if self.private is not None:
            own = self.folder / f"{name}-disk", self.private
            for folder in own:
                folder.mkdir(exist_ok=True)
        return Host(f"rd{self.key}-{name}", f"{self.subnet}.{place}", environment, own)

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.by_name.values())

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for place, host in enumerate(self, 1):
                self._join(host, f"port{place}")
        except BaseException:
            self.close()
            raise
        return self

    def _join(self, host: Host, port: str) -> None:
        ip("netns", "add", host.namespace)
        peer = ["peer", "name", "eth0", "netns", host.namespace]
        ip("-n", self.switch, "link", "add", port, "type", "veth", *peer)
        ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", host.namespace, "link", "set", device, "up")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        there = ip("netns", "list").split()
        for host in self:
            if host.namespace in there:
                host.kill()
                ip("netns", "delete", host.namespace)
        if self.switch in there:
            ip("netns", "delete", self.switch)
        for process in self.started:
            process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- Ray

    @property
    def dashboard(self) -> str:
        assert self.head is not None, "start_head first"
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def start_head(
        self, host: Host, num_cpus: int = 1, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Returns when the head's dashboard answers."""
        self.head = host
        process = self._start(
            host,
            num_cpus,
            ["--head", f"--port={GCS_PORT}", f"--dashboard-host={host.address}"],
            env,
        )
        self._wait(lambda: self.nodes() is not None, process, host, "the dashboard did not answer")
        return process

    def start_worker(
        self, host: Host, num_cpus: int = 2, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Returns at once: several may start side by side; then `wait_for_nodes`."""
        assert self.head is not None, "start_head first"
        return self._start(host, num_cpus, [f"--address={self.head.address}:{GCS_PORT}"], env)

    def _start(
        self, host: Host, num_cpus: int, more: list[str], env: dict[str, str] | None
    ) -> subprocess.Popen[str]:
        folder = Path(host.environment["RAY_TMPDIR"])
        folder.mkdir(exist_ok=True)
        arguments = [*more, "--block", f"--node-ip-address={host.address}", f"--temp-dir={folder}"]
        arguments += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        with (folder / "start.txt").open("ab") as told:
            process = host.popen("ray", "start", *arguments, env=env, stdout=told, stderr=told)
        self.started.append(process)
        return process

    def wait_for_nodes(self, count: int, seconds: float = READY_SECONDS) -> None:
        """Until `count` nodes are alive, the head among them."""
        deadline = time.monotonic() + seconds
        while len(self.alive()) != count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.alive()} are alive, not {count} nodes\n{self.told()}")
            time.sleep(0.3)

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head holds for alive."""
        return {node["nodeManagerAddress"] for node in self.nodes() or () if node["state"] == "ALIVE"}

    def nodes(self) -> list[dict[str, Any]] | None:
        """What the dashboard says of the nodes; None while it does not answer."""
        assert self.head is not None
        url = f"{self.dashboard}/nodes?view=summary"
        asked = self.head.run("python", "-S", "-c", ASK, url, self.token, stderr=subprocess.DEVNULL)
        if asked.returncode != 0:
            return None
        return [node["raylet"] for node in orjson.loads(asked.stdout)["data"]["summary"]]

    def _wait(self, done: Callable[[], bool], process: subprocess.Popen[str], host: Host, what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not done():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{host.namespace}: {what}\n{self.told()}")
            time.sleep(0.3)

    def told(self) -> str:
        """What `ray start` said on each host."""
        said = (Path(host.environment["RAY_TMPDIR"]) / "start.txt" for host in self)
        return "\n".join(path.read_text() for path in said if path.exists())
