"""A cluster that vanishes is noticed, and one that only pauses is not taken for gone."""

from __future__ import annotations

import socket

import pytest

from raydist.cluster import session as sessions
from raydist.cluster.session import Session
from raydist.errors import ClusterLost


def test_a_cluster_is_gone_once_it_has_not_answered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    session = Session()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(Session, "_what_is_gone", lambda self: self._silent(address))
        session.require()
    now[0] += 5
    session.require()  # the first refusal
    now[0] += sessions.GONE_SECONDS + 1
    with pytest.raises(ClusterLost, match=f"the cluster at {address} is gone: it has not answered for 21 s"):
        session.require()
    now[0] -= 20
    assert session.lost() and not session.can_restart  # for good
