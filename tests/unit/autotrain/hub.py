"""A hub on the loopback that speaks the few endpoints which an upload and a data set's parquet need."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

ASKED = re.compile(
    r"/(?:api/)?datasets/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>tree|resolve|revision)/(?:refs/convert/parquet|main|[0-9a-f]{40})/?(?P<rest>.*))?$"
)
"""The path of a request for a data set, its listing or a file of it."""


class Hub(ThreadingHTTPServer):
    """files: of data sets, {"owner/name/CONFIG/SPLIT/0000.parquet": bytes}, the same in every revision.

    token: what a request for a data set has to carry, if any.

    requests: (method, path, Authorization) of each.  uploaded: {"owner/name/file": bytes}.
    """

    def __init__(self, files: dict[str, bytes] | None = None, token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.token = files or {}, token
        self.commit = "0" * 40
        self.requests: list[tuple[str, str, str]] = []
        self.uploaded: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0"}


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _read(self) -> bytes:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Authorization", "")))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- uploads

    def do_POST(self) -> None:
        body, path = self._read(), urlparse(self.path).path
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": "http://127.0.0.1/me/model"})
        elif path.endswith("/preupload/main"):
            asked = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer({"files": asked})
        elif "/paths-info/" in path:
            name, _, _ = unquote(path).removeprefix("/api/datasets/").partition("/paths-info/")
            asked = json.loads(body)["paths"]
            self._answer([entry for entry in self._entries(name) if entry["path"] in asked])
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.uploaded[f"{repository}/{line['value']['path']}"] = content
            self._answer({"commitUrl": f"http://127.0.0.1/{repository}/commit/0", "commitOid": "0" * 40})
        else:
            self._answer({"errors": [], "warnings": []})

    # --- data sets

    def do_GET(self) -> None:
        self._read()
        path = unquote(urlparse(self.path).path)
        asked = ASKED.match(path)
        name = asked["name"] if asked else ""
        known = {"/".join(file.split("/")[:2]) for file in self.server.files}
        may_read = self.server.token in self.headers.get("Authorization", "")
        if asked and asked["what"] == "resolve" and may_read:
            self._send(f"{name}/{asked['rest']}")
        elif asked and name in known and asked["what"] == "tree" and may_read:
            deep = "recursive=true" in self.path.lower()
            self._answer(
                [e for e in self._entries(name) if _is_in(e["path"], asked["rest"].strip("/"), deep)]
            )
        elif name in known and may_read:
            self._answer({"id": name, "sha": self.server.commit, "siblings": []})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def _entries(self, name: str) -> list[dict[str, Any]]:
        files = {
            f.removeprefix(f"{name}/"): len(b) for f, b in self.server.files.items() if f.startswith(name)
        }
        folders = {"/".join(f.split("/")[:n]) for f in files for n in range(1, f.count("/") + 1)}
        as_folders = [{"type": "directory", "path": f, "oid": "1" * 40} for f in sorted(folders)]
        return as_folders + [
            {"type": "file", "path": f, "size": n, "oid": f"{n:040d}"} for f, n in sorted(files.items())
        ]

    def _send(self, file: str) -> None:
        content = self.server.files[file]
        told = {"ETag": f'"{len(content)}"', "X_Repo_Commit": self.server.commit, "Accept_Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last or len(content)) + 1]
            shown = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._answer(part, 206, Content_Range=shown, **told)
        else:
            self._answer(content, **told)


def _is_in(path: str, folder: str, deep: bool) -> bool:
    below = path.removeprefix(f"{folder}/") if folder else path
    return (path.startswith(f"{folder}/") or not folder) and (deep or "/" not in below)
