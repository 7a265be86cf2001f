from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raydist.bucket import mirror, objects
from tests import s3


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """The port of an S3 server."""
    with s3.serving() as port:
        yield port


@pytest.fixture
def storage(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node's mirror of an empty prefix of the server's bucket."""
    for name, value in s3.environment(server, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    objects.open_bucket.cache_clear()
    yield mirror.place_of(f"s3://{s3.BUCKET}/{tmp_path.name}/runs")
    objects.open_bucket.cache_clear()
