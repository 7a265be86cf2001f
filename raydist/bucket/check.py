"""Whether a bucket can hold runs, found out with a few small requests before anything is spent."""

from __future__ import annotations

import contextlib
import uuid
from datetime import UTC, datetime
from pathlib import Path

from raydist.bucket.mirror import object_of, usable
from raydist.bucket.objects import Changed, Exists, Missing
from raydist.errors import StorageError

CLOCK_SECONDS = 300.0
"""So much may this machine's clock differ from the store's: from then on leases of dead processes look alive,
and the times of records mislead. Stores themselves refuse requests from 900 s on."""


def check_bucket(storage: Path) -> None:
    """storage: the mirror of a prefix. Raises StorageError with the request that failed.

    Lists, writes, writes conditionally, reads and deletes one small object; it is removed again.
    """
    place = object_of(storage)
    if place is None:
        return
    usable(storage)
    prefix = f"{place.key}/" if place.key else ""
    key = f"{prefix}.raydist-probe-{uuid.uuid4().hex}"
    place.bucket.children(prefix)
    try:
        first = place.bucket.create(key, b"1")
        try:
            place.bucket.create(key, b"2")
        except Exists:
            pass
        else:
            raise _unconditional(place.bucket.uri, "it replaced an object that was only to be created")
        try:
            second = place.bucket.replace(key, b"3", first)
            place.bucket.replace(key, b"4", first)
        except Changed:
            pass
        else:
            raise _unconditional(place.bucket.uri, "it replaced an object that had changed meanwhile")
        there, version = place.bucket.get(key)
        if there != b"3" or version != second:
            raise _unconditional(place.bucket.uri, "what was read is not what was written")
        listed = place.bucket.head(key)
        if listed is not None:
            _check_clock(place.bucket.uri, (datetime.now(UTC) - listed.modified).total_seconds())
    except Missing as error:
        raise _unconditional(place.bucket.uri, "an object that was just written is not there") from error
    except BaseException:
        with contextlib.suppress(StorageError):  # the first error is the one to tell
            place.bucket.delete(key)
        raise
    place.bucket.delete(key)


def _check_clock(uri: str, ahead: float) -> None:
    if abs(ahead) > CLOCK_SECONDS:
        raise StorageError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's",
            where=uri,
            why="leases of dead processes would look alive, and records would have wrong times",
            fix="set the clock (NTP)",
        )


def _unconditional(uri: str, why: str) -> StorageError:
    return StorageError(
        f"{uri} cannot hold runs: its store has no conditional writes",
        where=uri,
        why=f"{why}; so nothing would keep two writers of a run apart",
        fix="take a store that has them: S3, Google Cloud Storage, Azure, Cloudflare R2, MinIO",
    )
