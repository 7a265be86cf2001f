"""The token that Ray asks of whoever connects: made by raydist, since Ray writes it readable by everyone."""

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
    """Make the token that an embedded Ray will read, unless it is in RAY_AUTH_TOKEN or not asked for."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        make_token(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN))


def make_token(path: Path) -> None:
    """Make the file if there is none, and let its owner alone read it. Raises ClusterError where it cannot.

    A file of another user's keeps its mode, as does one on a read-only mount (a Kubernetes secret).
    """
    path = path.expanduser()
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_once(path)
        found = path.stat()
    except OSError as error:
        raise ClusterError(
            "no authentication token can be made for Ray",
            where=str(path),
            why=str(error),
            fix="let this user write there, or give a token in RAY_AUTH_TOKEN",
        ) from error
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        with suppress(OSError):
            path.chmod(0o600)


def _write_once(path: Path) -> None:
    """Of processes that come here at once one makes the file, and none ever sees it without its token."""
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
