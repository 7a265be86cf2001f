"""What is told of a cluster: facts of its nodes in, findings out. Nodes go by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raydist.cluster.resources import workers_by_node
from raydist.errors import ClusterError
from raydist.job.schema import Job

CLOCK_SECONDS = 5.0
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Ray puts its object store
Nodes = dict[str, dict[str, Any]]
"""By name, what a node said: versions, shared_memory, object_store, clock, models, storage and unseen."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    ok: bool
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        told = ClusterError(self.what, where=self.where, why=self.why, fix=self.fix)
        return f"{'ok' if self.ok else 'WRONG':<6}{told}"


def hung(node: str, error: Exception) -> Finding:
    return Finding(
        False,
        "the checks could not run on a node",
        node,
        str(error).strip().splitlines()[-1],
        "see that raydist is installed there and that its mounts answer; else take the node out",
    )


def authentication(mode: str) -> Finding:
    if mode == "token":
        return Finding(True, "only who has the token can use the cluster")
    return Finding(
        False,
        f"the cluster runs without authentication: its mode is {mode}",
        "the head",
        "whoever reaches its port can run code on every node",
        "start Ray on all nodes with RAY_AUTH_MODE=token and the same ~/.ray/auth_token",
    )


def versions(nodes: Nodes, here: dict[str, str]) -> Iterator[Finding]:
    """`here`: those of the driver, by name; "" for what is not installed."""
    right = 0
    for node, facts in nodes.items():
        differ = [
            f"{name} {version or 'is not installed'}" + (f", not {here[name]}" if here[name] else "")
            for name, version in facts["versions"].items()
            if version != here[name] or not version
        ]
        right += not differ
        if differ:
            why = "the driver's differ: workers might not understand each other, or compute otherwise"
            yield Finding(False, "; ".join(differ), node, why, "install requirements.lock on this node")
    if right == len(nodes):
        same = ", ".join(f"{name} {version}" for name, version in here.items())
        yield Finding(True, f"the same versions on {right} nodes: {same}")


def clocks(nodes: Nodes) -> Iterator[Finding]:
    wrong = {node: facts["clock"] for node, facts in nodes.items() if facts["clock"] > CLOCK_SECONDS}
    for node, seconds in wrong.items():
        why = "whether a run is alive, and what is newest, is told by time"
        yield Finding(False, f"the clock is off by {seconds:.0f} s", node, why, "let chrony or ntpd set it")
    if not wrong:
        yield Finding(True, f"clocks within {CLOCK_SECONDS:g} s of the driver's on {len(nodes)} nodes")


def shared_memory(nodes: Nodes) -> Iterator[Finding]:
    free = {node: (facts["shared_memory"], facts["object_store"]) for node, facts in nodes.items()}
    wrong = {node: (has, needs) for node, (has, needs) in free.items() if has < needs}
    for node, (has, needs) in wrong.items():
        yield Finding(
            False,
            f"{SHARED_MEMORY} has {has / 2**20:,.0f} MiB free, the object store needs {needs / 2**20:,.0f}",
            node,
            "Ray keeps its objects on disk then, or its processes die when the memory is full",
            "give a container --shm-size, a pod a Memory emptyDir; or start Ray with --object-store-memory",
        )
    if not wrong:
        yield Finding(True, f"{SHARED_MEMORY} holds the object store on {len(nodes)} nodes")


def storage(folder: str, nodes: Nodes, driver: str) -> Iterator[Finding]:
    """Of two nodes that do not share, the one that is not the driver's is wrong."""

    def apart(node: str, other: str) -> bool:
        return other in nodes[node]["unseen"] or node in nodes[other]["unseen"]

    unwritable = {node for node, facts in nodes.items() if facts["storage"]}
    alone = {node for node in nodes if driver not in unwritable and apart(node, driver)} | unwritable
    rest = [node for node in nodes if node not in alone]
    alone |= {node for node in rest if any(apart(node, other) for other in rest)}
    for node in sorted(alone):
        error = nodes[node]["storage"] or "it does not see what others wrote, or they do not see what it did"
        yield Finding(
            False,
            f"storage {folder} is not shared: {error}",
            node,
            "checkpoints, token logs and models go through it from node to node",
            f"mount the same file system at {folder} on every node, writable",
        )
    if not alone:
        yield Finding(True, f"storage {folder} is written and read by {len(nodes)} nodes")


def models(names: list[str], nodes: Nodes) -> Iterator[Finding]:
    for name in names:
        found = {node: facts["models"][name] for node, facts in nodes.items()}
        folder = is_path(name) or "folder" in found.values()
        absent = [node for node, kind in found.items() if not kind or (folder and kind != "folder")]
        what = f"no folder {name}" if folder else f"{name} is not in the cache, and the hub does not answer"
        why = "every worker loads the model, or its tokenizer, by this name"
        for node in absent:
            yield Finding(False, what, node, why, "copy it there, or name a folder on the shared storage")
        if not absent:
            some = sum(kind == "hub" for kind in found.values())
            there = f"will be downloaded on {some} nodes" if some else f"is on {len(found)} nodes"
            yield Finding(True, f"{name} {there}")


def is_path(name: str) -> bool:
    """Hub ids have one slash at most."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1


def resources(job: Job, nodes: list[dict[str, float]], may_grow_to: float = 0) -> Finding:
    """A worker must fit on a node, and Ray Data needs a CPU besides. `may_grow_to`: CPUs, by autoscaling."""
    workers, each = job.scaling.num_workers, job.scaling.cpus_per_worker
    cpus, cards = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    room, gpus = sum(workers_by_node(job, nodes)), job.scaling.on_gpus(sum(cards))
    needs = f"{workers} workers of {each} CPUs{' and a GPU' * gpus}, and 1 CPU for the data"
    has = f"nodes of {cpus} CPUs" + f" and {cards} GPUs" * gpus
    if room >= workers and sum(cpus) > workers * each:
        return Finding(True, f"{needs}, fit on {has}")
    if may_grow_to > max(sum(cpus), workers * each):
        return Finding(True, f"{needs}: the cluster, of {has}, may grow to {may_grow_to:g} CPUs")
    return Finding(
        False,
        f"the job does not fit: {needs}, on {has}",
        "scaling",
        f"there is room for {room} workers" if room < workers else "no CPU is left for the data",
        f"add nodes, or set scaling.num_workers to {max(1, min(room, (sum(cpus) - 1) // each))} or less",
    )
