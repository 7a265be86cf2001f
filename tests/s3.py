"""An S3 server on loopback, moto's, and a proxy in front of it that breaks a share of the requests."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "raydist-test"


def environment(port: int, cache: Path, host: str = "127.0.0.1") -> dict[str, str]:
    """What a process needs to use the server."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "RAYDIST_CACHE": str(cache),
    }


@contextlib.contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server in a process of its own, with BUCKET in it, until the block ends."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "--host", host, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        make_bucket(host, port)
        yield port
    finally:
        server.kill()
        server.wait()


def make_bucket(host: str, port: int) -> None:
    """Once the server answers."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=10)
        try:
            headers = {
                "Host": "s3.amazonaws.com",
                "Authorization": "AWS4-HMAC-SHA256 Credential=key/x/us-east-1/s3",
            }
            connection.request("PUT", f"/{BUCKET}", headers=headers)
            assert connection.getresponse().status == 200
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        finally:
            connection.close()


class Faults:
    """What the proxy does, and what it has done. share: of the requests that go wrong.

    refused: the status and code with which every request of these methods is answered; None for none.
    """

    KINDS = ("500", "503", "reset before", "reset after", "cut")

    def __init__(
        self, share: float, seed: int = 0, refused: tuple[int, str, tuple[str, ...]] | None = None
    ) -> None:
        self.refused = refused
        self.share, self.count = share, dict.fromkeys(self.KINDS, 0)
        self._random, self._lock = random.Random(seed), threading.Lock()

    def next(self) -> str:
        with self._lock:
            if self._random.random() >= self.share:
                return ""
            kind = self._random.choice(self.KINDS)
            self.count[kind] += 1
            return kind


@contextlib.contextmanager
def faulty(port: int, faults: Faults) -> Iterator[int]:
    """The port of a proxy in front of the server. After "reset after" the server has done what was asked."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if faults.refused is not None and self.command in faults.refused[2]:
                status, code, _ = faults.refused
                said = f"<Code>{code}</Code><Message>No.</Message><AWSAccessKeyId>key</AWSAccessKeyId>"
                self._answer(status, {}, f"<Error>{said}</Error>".encode())
                return
            kind = faults.next()
            if kind in ("500", "503"):
                self._answer(int(kind), {}, b"")
                return
            if kind == "reset before":
                self._reset()
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content, headers = answer.read(), dict(answer.getheaders())
            connection.close()
            if kind == "reset after":
                self._reset()
            else:
                self._answer(answer.status, headers, content, cut=kind == "cut")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            known = {name.lower(): value for name, value in headers.items()}
            for name in ("etag", "last-modified", "content-type"):
                if name in known:
                    self.send_header(name, known[name])
            length = known.get("content-length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._reset()

        def _reset(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def environ(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
