"""A file in an attempt's folder by which any process asks for a checkpoint after the next step."""

from __future__ import annotations

import uuid

from raydist import files
from raydist.folder import RunFolder

FILE = "commit-asked"


def ask_for_commit(folder: RunFolder, attempt: int) -> None:
    """Another text for each time that somebody asks."""
    files.write_text(folder.attempt(attempt) / FILE, uuid.uuid4().hex)


def asked(folder: RunFolder, attempt: int) -> str:
    """The text; empty where nobody asked."""
    path = folder.attempt(attempt) / FILE
    try:
        return path.read_text() if folder.look(path) else ""
    except OSError:
        return ""
