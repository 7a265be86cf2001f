"""Paths that stand for objects of a bucket, by their names alone: see raydist/bucket.

<cache>/raydist-buckets/s3/<bucket>/<key>      s3://<bucket>/<key>
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "raydist-buckets"

_TEMPORARY = re.compile(r"\..*\.tmp")
_IN_TEXT = re.compile(rf"(?:/[^\s/'\":,;()]+)*/{FOLDER}/(\w+)/")


def split(path: Path) -> tuple[str, str, str] | None:
    """Scheme, bucket and key; None for a path that stands for no object, such as a temporary one."""
    parts = path.parts
    if FOLDER not in parts:
        return None
    at = parts.index(FOLDER)
    if len(parts) < at + 3 or any(_TEMPORARY.fullmatch(part) for part in parts[at:]):
        return None
    return parts[at + 1], parts[at + 2], "/".join(parts[at + 3 :])


def uri_of(path: Path) -> str | None:
    """s3://bucket/key of a path that stands for an object; None for any other."""
    if (found := split(path)) is None:
        return None
    scheme, bucket, key = found
    return f"{scheme}://{bucket}/{key}" if key else f"{scheme}://{bucket}"


def shown(path: Path) -> str:
    """A path as users know it: its URI if it has one."""
    return uri_of(path) or str(path)


def with_uris(text: str) -> str:
    """The text with URIs in place of the paths that stand for objects."""
    return _IN_TEXT.sub(r"\1://", text) if FOLDER in text else text
