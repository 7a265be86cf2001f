"""How many training workers a cluster holds, node by node: a worker cannot be spread over two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydist.errors import ClusterError
from raydist.job.schema import Job

if TYPE_CHECKING:
    from raydist.corpus.pipeline import Share


def workers_that_fit(job: Job) -> int:
    """On the cluster that this process is connected to, if nothing else ran there."""
    return places(job, [node["Resources"] for node in _nodes()])


def places(job: Job, nodes: Sequence[dict[str, float]]) -> int:
    """For workers of `job` on nodes of these resources; one that asks for a GPU needs it on its own node."""
    each, gpus = job.scaling.cpus_per_worker, job.scaling.use_gpu is True
    fitting = [(int(node.get("CPU", 0) // each), int(node.get("GPU", 0))) for node in nodes]
    return sum(min(of_cpus, of_gpus) if gpus else of_cpus for of_cpus, of_gpus in fitting)


def require_room(job: Job, what: str) -> int:
    """How many runs of `job` fit at a time. Raises ClusterError, with the numbers, if not even one does."""
    fitting, asked = workers_that_fit(job), job.scaling.num_workers
    if fitting >= asked:
        return fitting // asked
    each = f"{job.scaling.cpus_per_worker} CPUs" + (" and a GPU" if job.scaling.use_gpu is True else "")
    raise ClusterError(
        f"the cluster has no room for {what}: {asked} workers of {each}, of which it holds {fitting}",
        where="; ".join(f"{node['NodeManagerAddress']}: {_told(node['Resources'])}" for node in _nodes()),
        why="a worker needs its CPUs and its GPU on one node",
        fix="add nodes, or lower scaling.num_workers or scaling.cpus_per_worker",
    )


def spare(job: Job) -> Share | None:
    """What training leaves free for preparing beside it: whole nodes, else CPUs; None if that is nothing."""
    from raydist.corpus.pipeline import Share

    nodes = sorted(_nodes(), key=lambda node: places(job, [node["Resources"]]))
    left = job.scaling.num_workers
    while nodes and left > 0:
        left -= places(job, [nodes.pop()["Resources"]])
    if free := [node for node in nodes if _cpus(node)]:
        return Share(sum(map(_cpus, free)), tuple(node["NodeID"] for node in free))
    cpus = sum(map(_cpus, _nodes())) - job.scaling.num_workers * job.scaling.cpus_per_worker
    # On nodes that it shares with training, tasks of one CPU could split the room of a larger worker.
    return Share(cpus) if cpus >= 1 and (job.scaling.cpus_per_worker == 1 or len(_nodes()) == 1) else None


def _cpus(node: dict[str, Any]) -> float:
    """An embedded Ray may promise more than this machine has."""
    promised: float = node["Resources"].get("CPU", 0)
    return min(promised, os.cpu_count() or 1) if len(_nodes()) == 1 else promised


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _told(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
