"""Judge a cluster: facts about its nodes in, findings out. Nodes are identified by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydist.cluster.resources import room, workers_by_node
from raydist.errors import ClusterError
from raydist.job.schema import Job
from raydist.places import shown, uri_of

CLOCK_SECONDS = 5.0
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Ray puts its object store
Nodes = dict[str, dict[str, Any]]
"""Name -> the node's facts: versions, shared_memory, object_store, clock, models, storage and unseen."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    ok: bool
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = ClusterError(self.what, where=self.where, why=self.why, fix=self.fix)
        return f"{'ok' if self.ok else 'WRONG':<6}{text}"


def no_answer(node: str, error: Exception) -> Finding:
    return Finding(
        False,
        "the checks could not run on a node",
        node,
        str(error).strip().splitlines()[-1],
        "check that raydist is installed there and that its mounts answer; or remove the node",
    )


def authentication(mode: str) -> Finding:
    if mode == "token":
        return Finding(True, "only those who have the token can use the cluster")
    return Finding(
        False,
        f"the cluster runs without authentication: its mode is {mode}",
        "the head",
        "whoever reaches its port can run code on every node",
        "start Ray on all nodes with RAY_AUTH_MODE=token and the same ~/.ray/auth_token",
    )


def versions(nodes: Nodes, driver: dict[str, str]) -> Iterator[Finding]:
    """driver: package -> its version in the driver's environment, "" if it is not installed there."""
    n_equal = 0
    for node, facts in nodes.items():
        differ = [
            f"{name} {version or 'is not installed'}" + (f", not {driver[name]}" if driver[name] else "")
            for name, version in facts["versions"].items()
            if version != driver[name] or not version
        ]
        n_equal += not differ
        if differ:
            why = "the driver's differ: processes might not understand each other, or compute other results"
            yield Finding(False, "; ".join(differ), node, why, "install requirements.lock on this node")
    if n_equal == len(nodes):
        same = ", ".join(f"{name} {version}" for name, version in driver.items())
        yield Finding(True, f"the same versions on {n_equal} nodes: {same}")


def clocks(nodes: Nodes) -> Iterator[Finding]:
    wrong = {node: facts["clock"] for node, facts in nodes.items() if facts["clock"] > CLOCK_SECONDS}
    for node, seconds in wrong.items():
        why = "timestamps decide whether a run is alive and what is newest"
        yield Finding(False, f"the clock is off by {seconds:.0f} s", node, why, "let chrony or ntpd set it")
    if not wrong:
        yield Finding(True, f"clocks within {CLOCK_SECONDS:g} s of the driver's on {len(nodes)} nodes")


def shared_memory(nodes: Nodes) -> Iterator[Finding]:
    free = {node: (facts["shared_memory"], facts["object_store"]) for node, facts in nodes.items()}
    wrong = {node: (has, needs) for node, (has, needs) in free.items() if has < needs}
    for node, (has, needs) in wrong.items():
        yield Finding(
            False,
            f"{SHARED_MEMORY} has {has / 1e6:,.0f} MB free, the object store needs {needs / 1e6:,.0f}",
            node,
            "Ray would keep its objects on disk, or its processes would die when the memory is full",
            "give a container --shm-size, a pod a Memory emptyDir; or start Ray with --object-store-memory",
        )
    if not wrong:
        yield Finding(True, f"{SHARED_MEMORY} holds the object store on {len(nodes)} nodes")


def storage(folder: str, nodes: Nodes, driver: str) -> Iterator[Finding]:
    """If two nodes do not share the folder, the one that differs from the driver's is wrong."""
    place, remote = shown(Path(folder)), uri_of(Path(folder)) is not None

    def differ(node: str, other: str) -> bool:
        return other in nodes[node]["unseen"] or node in nodes[other]["unseen"]

    unwritable = {node for node, facts in nodes.items() if facts["storage"]}
    alone = {node for node in nodes if driver not in unwritable and differ(node, driver)} | unwritable
    rest = [node for node in nodes if node not in alone]
    alone |= {node for node in rest if any(differ(node, other) for other in rest)}
    for node in sorted(alone):
        error = (
            nodes[node]["storage"] or "it does not see the files of other nodes, or they do not see its files"
        )
        yield Finding(
            False,
            f"storage {place} cannot be used: {error}"
            if remote
            else f"storage {place} is not shared: {error}",
            node,
            "checkpoints, token logs and models go through it from node to node",
            "give every node credentials that may list, read, write and delete there"
            if remote
            else f"mount the same file system at {place} on every node, writable",
        )
    unlocked = [node for node in nodes if nodes[node].get("lock_granted")]
    for node in unlocked:
        yield Finding(
            False,
            f"locks in storage {place} do not hold from node to node",
            node,
            "a run's lock keeps two drivers apart; there both would write into it",
            "mount it with locks (NFS without nolock, Lustre with flock), or take a bucket",
        )
    if not alone and not unlocked:
        yield Finding(True, f"storage {place} is written and read by {len(nodes)} nodes")


def models(names: list[str], nodes: Nodes) -> Iterator[Finding]:
    for name in names:
        kinds = {node: facts["models"][name] for node, facts in nodes.items()}
        folder = is_path(name) or "folder" in kinds.values()
        absent = [node for node, kind in kinds.items() if not kind or (folder and kind != "folder")]
        what = f"no folder {name}" if folder else f"{name} is not in the cache, and the hub does not answer"
        why = "every worker loads the model, or its tokenizer, by this name"
        for node in absent:
            yield Finding(False, what, node, why, "copy it there, or name a folder on the shared storage")
        if not absent:
            n_hub = sum(kind == "hub" for kind in kinds.values())
            place = f"will be downloaded on {n_hub} nodes" if n_hub else f"is on {len(kinds)} nodes"
            yield Finding(True, f"{name} {place}")


def is_path(name: str) -> bool:
    """Whether `name` must be a path: hub ids have one slash at most."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def resources(job: Job, nodes: list[dict[str, float]], may_grow_to: float = 0) -> Finding:
    """Each worker must fit on one node; Ray Data needs one more CPU. may_grow_to: CPUs, by autoscaling."""
    scaling, workers, asked = job.scaling, job.scaling.least, job.scaling.cpus_per_worker
    each = 1 if asked == "auto" else asked
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    on_gpus = scaling.on_gpus(sum(gpus))
    there = room(job, nodes) if scaling.elastic else sum(workers_by_node(job, nodes))
    least = f"{each} CPUs" + " or more" * (asked == "auto")
    up_to = f" to {scaling.most}" * scaling.elastic
    needs = f"{workers}{up_to} workers of {least}{' and a GPU' * on_gpus}, and 1 CPU for the data"
    has = f"nodes of {cpus} CPUs" + f" and {gpus} GPUs" * on_gpus
    if there >= workers and sum(cpus) > workers * each:
        return Finding(True, f"{needs}, fit on {has}" + f": {there} now" * scaling.elastic)
    if may_grow_to > max(sum(cpus), workers * each):
        return Finding(True, f"{needs}: the cluster, of {has}, may grow to {may_grow_to:g} CPUs")
    return Finding(
        False,
        f"the job does not fit: {needs}, on {has}",
        "scaling",
        f"there is room for {there} workers" if there < workers else "no CPU is left for the data",
        f"add nodes, or set {'the least of ' * scaling.elastic}scaling.num_workers to"
        f" {max(1, min(there, (sum(cpus) - 1) // each))} or less",
    )
