"""How many training workers fit on a cluster, node by node: a worker cannot be split between two nodes."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist.errors import ClusterError
from raydist.job.plan import sized
from raydist.job.schema import Job

if TYPE_CHECKING:
    from raydist.corpus.pipeline import Share


Resources = dict[str, float]
CORES = "cores"
"""Resource of an embedded Ray's node: the CPUs it really has, since it may promise more."""
FREE = "free "
"""In front of CPU and GPU: what of it nobody else has reserved. Where it is missing, all counts as free."""
ASKED_AT_ONCE = 32


def node_resources() -> list[Resources]:
    """What each living node of the cluster has, busy or not."""
    return _resources(living_nodes())


def free_resources(ours: Collection[str]) -> list[Resources]:
    """The same of each living node that answers and stays, with what is free there.

    ours: ids of placement groups, in hexadecimal digits; what they hold counts as free. A node that was lost
    a moment ago is still alive for Ray, for a minute or so where it was cut off. On one that it drains, Ray
    places nothing.
    """
    from ray._private.state import available_resources_per_node, state
    from ray.util.placement_group import placement_group_table

    from raydist.cluster.session import Session

    going = Session().do(state.get_draining_nodes, "draining nodes")
    nodes = [node for node in living_nodes() if node["NodeID"] not in going]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        answering = list(pool.map(_answers, nodes))
    free = Session().do(available_resources_per_node, "free resources")
    groups = Session().do(placement_group_table, "placement groups")
    own = [group for name, group in groups.items() if name in ours and group["state"] != "REMOVED"]
    held = [(group["bundles_to_node_id"], group["bundles"]) for group in own]
    found = []
    for node, answers in zip(nodes, answering, strict=True):
        if answers:
            known = free.get(node["NodeID"], {})
            bundles = [b[n] for places, b in held for n, place in places.items() if place == node["NodeID"]]
            each = {
                FREE + name: known.get(name, 0) + sum(bundle.get(name, 0) for bundle in bundles)
                for name in ("CPU", "GPU")
            }
            found.append({**node["Resources"], **each})
    return found


def may_grow_to() -> float:
    """CPUs of the cluster at most if Ray's autoscaler adds nodes; 0 without an autoscaler."""
    from ray._private.state import state

    return float((state.get_max_resources_from_cluster_config() or {}).get("CPU", 0))


def gpus() -> float:
    """Number of GPUs in the cluster, busy or not."""
    return sum(node.get("GPU", 0) for node in node_resources())


def cores() -> int:
    """CPUs that this process may use: of its affinity, and of its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return allowed


def cpus_per_worker(job: Job, nodes: Sequence[Resources]) -> int:
    """CPUs for each worker of `job` on these nodes, which `auto` shares over the workers.

    A node of more than two keeps one for the data. A worker cannot be split between two nodes.
    """
    asked = job.scaling.cpus_per_worker
    if asked != "auto":
        return asked
    if job.scaling.on_gpus(sum(node.get("GPU", 0) for node in nodes)):
        return 1
    cpus = [_shared_cpus(node) for node in nodes]
    fitting = (
        each for each in range(max(cpus, default=1), 1, -1)
        if sum(n // each for n in cpus) >= job.scaling.most
    )  # fmt: skip
    return next(fitting, 1)


def _shared_cpus(node: Resources) -> int:
    """CPUs of a node that `auto` shares over the workers."""
    there = int(min(node.get("CPU", 0), node.get(CORES, math.inf)))
    return int(min(there - 1 if there > 2 else there, node.get(FREE + "CPU", math.inf)))


def cpus_per_worker_here(job: Job) -> int:
    """What an embedded Ray of this machine needs for each. A sweep shares the CPUs over its trials later."""
    return cpus_per_worker(job, [{"CPU": cores() if job.tune is None else 1}])


def sized_here(job: Job) -> Job:
    """The job with the number of workers that an embedded Ray of this machine has room for."""
    return sized(job, room(job, [{"CPU": cores(), CORES: cores()}]))


def room(job: Job, nodes: Sequence[Resources]) -> int:
    """How many workers of `job` these nodes hold, of its range at most the most.

    An embedded Ray holds the least in any case: it promises the CPUs for them. Any other may hold fewer.
    """
    scaling = job.scaling
    on_gpus = scaling.on_gpus(sum(node.get("GPU", 0) for node in nodes))
    if scaling.cpus_per_worker == "auto" and not on_gpus:
        fitting = sum(_shared_cpus(node) for node in nodes)
    else:
        there = [{**node, "CPU": min(node.get("CPU", 0), node.get(CORES, math.inf))} for node in nodes]
        fitting = sum(workers_by_node(job, there))
    if any(CORES in node for node in nodes):
        fitting = max(fitting, scaling.least)
    return min(fitting, scaling.most)


def workers_by_node(job: Job, nodes: Sequence[Resources]) -> list[int]:
    """How many workers of `job` fit on each of these nodes, if nothing else runs there."""
    each, on_gpus = cpus_per_worker(job, nodes), job.scaling.on_gpus(sum(n.get("GPU", 0) for n in nodes))
    by_cpu = [int(_free(node, "CPU") // each) for node in nodes]
    by_gpu = [int(_free(node, "GPU")) for node in nodes]
    return [min(pair) for pair in zip(by_cpu, by_gpu, strict=True)] if on_gpus else by_cpu


def _free(node: Resources, name: str) -> float:
    return min(node.get(name, 0), node.get(FREE + name, math.inf))


def require_room(job: Job, what: str) -> int:
    """How many runs of `job` fit at a time. Raises ClusterError, with the numbers, if not even one does."""
    wanted = job.scaling.least
    fitting = sum(workers_by_node(job, node_resources()))
    if fitting >= wanted:
        return fitting // wanted
    each = f"{cpus_per_worker(job, node_resources())} CPUs" + " and a GPU" * job.scaling.on_gpus(gpus())
    raise ClusterError(
        f"the cluster has no room for {what}: {wanted} workers of {each}, and it holds {fitting}",
        where="; ".join(f"{n['NodeManagerAddress']}: {_text(n['Resources'])}" for n in living_nodes()),
        why="a worker needs its CPUs and its GPU on one node",
        fix="add nodes, or lower scaling.num_workers or scaling.cpus_per_worker",
    )


def spare(job: Job) -> Share | None:
    """What training leaves free for preparing meanwhile: whole nodes, else CPUs; None if nothing is left."""
    from raydist.corpus.pipeline import Share

    nodes = living_nodes()
    job = sized(job, max(job.scaling.least, room(job, _resources(nodes))))
    wanted = job.scaling.most
    cpus = [float(node["Resources"].get("CPU", 0)) for node in nodes]
    if len(nodes) == 1:  # an embedded Ray may promise more than this machine has
        cpus = [min(cpus[0], os.cpu_count() or 1)]
    each = cpus_per_worker(job, _resources(nodes))
    by_node = zip(workers_by_node(job, _resources(nodes)), cpus, nodes, strict=True)
    left, free = wanted, {}
    for workers, n_cpus, node in sorted(by_node, key=lambda entry: entry[0], reverse=True):
        if left <= 0 and n_cpus:
            free[str(node["NodeID"])] = n_cpus
        left -= workers
    if free:
        return Share(sum(free.values()), tuple(free))
    rest = sum(cpus) - wanted * each
    # On nodes with training workers, one-CPU tasks could occupy CPUs that a larger worker needs together.
    return Share(rest) if rest >= 1 and (each == 1 or len(nodes) == 1) else None


def living_nodes() -> list[dict[str, Any]]:
    """As Ray describes them.

    Raises ClusterLost where Ray's own processes have ended: the answer would be waited for without end.
    """
    import ray

    from raydist.cluster.session import Session

    return [node for node in Session().do(ray.nodes, "nodes") if node["Alive"]]


def _answers(node: dict[str, Any]) -> bool:
    from raydist.cluster.session import answers

    return answers(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")


def _resources(nodes: Sequence[dict[str, Any]]) -> list[Resources]:
    return [node["Resources"] for node in nodes]


def _text(resources: Resources) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
