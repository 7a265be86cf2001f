"""Nodes that Ray has been told to give up: their machines are taken away soon, as spot instances are."""

from __future__ import annotations

from raydist.cluster.resources import living_nodes
from raydist.cluster.session import Session
from raydist.own_ray import is_embedded


def draining_hosts() -> dict[str, float]:
    """Host name -> when it goes away, as UNIX seconds; 0 where no time is known. Raises ClusterLost."""
    if is_embedded():
        return {}
    from ray._private import state

    until = Session().do(state.state.get_draining_nodes, "draining nodes")
    hosts = {str(node["NodeID"]): str(node["NodeManagerHostname"]) for node in living_nodes()}
    return {hosts[node]: at / 1000 for node, at in until.items() if node in hosts}
