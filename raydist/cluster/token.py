"""The token for connecting to Ray. raydist creates it, since Ray would make the file readable by everyone."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from raydist.errors import ClusterError

TOKEN = "~/.ray/auth_token"  # noqa: S105 - where Ray looks for it


def ensure_token() -> None:
    """Create the token that an embedded Ray will read, unless RAY_AUTH_TOKEN has it or Ray needs none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        make_token(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN))


def make_token(path: Path) -> None:
    """Create the file if there is none, readable by its owner only. Raises ClusterError if that fails.

    A file of another user keeps its mode, and so does one on a read-only mount (a Kubernetes secret).
    """
    path = path.expanduser()
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_once(path)
        status = path.stat()
    except OSError as error:
        raise ClusterError(
            "no authentication token can be created for Ray",
            where=str(path),
            why=str(error),
            fix="let this user write there, or set RAY_AUTH_TOKEN to a token",
        ) from error
    if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) & 0o077:
        with suppress(OSError):
            path.chmod(0o600)


def _write_once(path: Path) -> None:
    """Create the file atomically: of several processes one creates it, and none sees it without its token."""
    descriptor, temporary = tempfile.mkstemp(prefix=".auth_token.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))  # 256 bits, as Ray's own
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        Path(temporary).unlink()
