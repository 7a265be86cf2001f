"""Ray's token: for its owner alone, whole from the first moment, and one for all who start at once."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raydist.cluster.token import ensure_token, make_token
from raydist.errors import ClusterError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_file_is_made_for_its_owner_alone_and_kept(home: Path) -> None:
    umask = os.umask(0)
    try:
        ensure_token()
    finally:
        os.umask(umask)
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    path.chmod(0o644)
    ensure_token()
    assert (path.read_text(), mode(path)) == (token, 0o600)
    assert [each.name for each in path.parent.iterdir()] == ["auth_token"]


def test_what_the_environment_says_of_the_token_holds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "own" / "token"))
    ensure_token()
    assert mode(home / "own" / "token") == 0o600
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    ensure_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ensure_token()
    assert not (home / ".ray").exists()


def test_those_that_start_at_once_have_one_token_and_never_see_an_empty_file(tmp_path: Path) -> None:
    n, rounds = 4, 20

    def token_of(path: Path, ready: threading.Barrier) -> str:
        ready.wait()
        make_token(path)
        return path.read_text()

    with ThreadPoolExecutor(n) as pool:
        for turn in range(rounds):
            path, ready = tmp_path / str(turn) / "token", threading.Barrier(n)
            tokens = {each.result() for each in [pool.submit(token_of, path, ready) for _ in range(n)]}
            assert len(tokens) == 1 and len(tokens.pop()) == 64


def test_where_no_file_can_be_made_the_way_out_is_named(home: Path) -> None:
    (home / ".ray").write_text("not a folder")
    with pytest.raises(ClusterError, match=r"(?s)no authentication token.*\.ray.*RAY_AUTH_TOKEN"):
        ensure_token()
