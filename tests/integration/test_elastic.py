"""A run that shrinks where hosts die and grows where there is room again: on hosts as those of test_hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydist import files
from raydist.folder import RunFolder
from raydist.track.ettr import effective_time
from raydist.track.records import Record, read_metrics
from tests.hosts import GCS_PORT, Hosts, can_run
from tests.integration.test_hosts import STEPS, Submitted, check_unbroken, training
from tests.whole_run import finish, folder_of, start, wait_for_step, whole_job, workers, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(can_run()), reason=can_run())]

HOLD = """
import pathlib, time
import raydist

class Hold(raydist.Hook):
    \"\"\"Each size of the run waits at a step of its own for what is to happen to it there.\"\"\"

    def on_step(self, attempt, result):
        grown = attempt.folder.resize_flag(attempt.spec.attempt)
        of_size = {{3: (10, pathlib.Path({killed!r})), 1: (14, grown)}}
        step, until = of_size.get(attempt.world.world_size, (0, None))
        while until is not None and attempt.step >= step and not until.exists():
            attempt.phases.heard()
            time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and two more, each with one CPU: a worker on each."""
    with Hosts("head", "one", "two", "laptop") as hosts:
        hosts.start_head(hosts["head"], num_cpus=1)
        yield hosts


def ensure(hosts: Hosts, *names: str) -> None:
    for name in names:
        if hosts[name].address not in hosts.alive() or not hosts[name].pids():
            hosts.start_worker(hosts[name], num_cpus=1)
    hosts.wait_for_nodes(1 + len(names))


def elastic_job(folder: Path, strategy: dict[str, Any]) -> dict[str, Any]:
    write_corpus(folder / "text.jsonl")
    (folder / "of_mine.py").write_text(HOLD.format(killed=str(folder / "killed")))
    whole = whole_job(folder / "text.jsonl", folder / "runs")
    return {
        **whole,
        "name": "elastic",
        "train": {
            **whole["train"],
            "max_steps": STEPS,
            "global_batch_size": 12,
            "hooks": ["of_mine:Hold"],
        },
        "strategy": strategy,
        "scaling": {"num_workers": [1, 3], "grow_after": 1},
        "eval": {**whole["eval"], "eval_steps": STEPS},
    }


def begun(folder: RunFolder) -> list[tuple[int, int]]:
    """Step and workers at which each attempt began."""
    return [(r["step"], r["world_size"]) for r in read_metrics(folder) if r["kind"] in ("start", "resume")]


def of_kind(folder: RunFolder, kind: str) -> list[Record]:
    return [record for record in read_metrics(folder) if record["kind"] == kind]


@pytest.mark.parametrize(
    "strategy", [{"name": "ddp"}, {"name": "fsdp"}, {"name": "zero", "stage": 2}], ids=lambda s: s["name"]
)
def test_a_run_shrinks_from_three_workers_to_one_and_grows_to_two(
    hosts: Hosts, tmp_path: Path, strategy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three hosts die at step 10; one comes back while the last worker trains on alone."""
    ensure(hosts, "one", "two")
    job = elastic_job(tmp_path, strategy)
    run = Submitted(hosts, job)
    run.wait_for_step(9)  # the hook holds the run in step 10
    assert {host.namespace for host in training(hosts)} == {
        hosts[name].namespace for name in ("head", "one", "two")
    }
    for name in ("one", "two"):
        hosts[name].kill()
    (tmp_path / "killed").touch()
    run.wait_until(lambda: (8, 1) in begun(run.folder), "attempt of one worker")
    hosts.start_worker(hosts["two"], num_cpus=1)
    output = run.finish()
    (first, shrunk, grown) = begun(run.folder)
    assert (first, shrunk, grown[1]) == ((0, 3), (8, 1), 2)
    assert grown[0] >= 14, "a run that grows goes on from the checkpoint just before"
    trained = {r["step"]: r["attempt"] for r in of_kind(run.folder, "train") if r["attempt"] > 1}
    assert max(step for step, attempt in trained.items() if attempt == 2) == grown[0]
    assert [(r["from"], r["to"]) for r in of_kind(run.folder, "resize")] == [(3, 1), (1, 2)]
    assert "workers: 3 before, 1 now" in output and "there is room for 2 workers" in output
    assert "ETTR  " in output
    check_unbroken({**job, "scaling": {"num_workers": 1}, "train": {**job["train"], "hooks": []}}, run.folder)
    steps = [
        line["samples"][1] // 12 - line["samples"][0] // 12
        for line in files.read_jsonl(run.folder.ledger_file)
    ]
    assert sum(steps) >= STEPS
    effective = effective_time(read_metrics(run.folder))
    assert effective is not None and 0 < effective.ratio < 1
    with capsys.disabled():
        print(f" [{begun(run.folder)}, ETTR {effective.ratio:.1%}]", end="")


def test_a_lost_process_on_a_living_node_changes_nothing(tmp_path: Path) -> None:
    """Its room is still there. On an embedded Ray, which has as many workers as the machine has cores."""
    write_corpus(tmp_path / "text.jsonl")
    job = whole_job(tmp_path / "text.jsonl", tmp_path / "runs")
    job["scaling"] = {"num_workers": [2, 3], "cpus_per_worker": 1}
    process = start(job)
    wait_for_step(folder_of(job), 10, process)
    workers(process)[1].kill()
    code, output = finish(process)
    assert code == 0, output
    (first, second) = begun(folder_of(job))
    assert second[1] == first[1] >= 2 and second[0] >= 8
    assert not of_kind(folder_of(job), "resize")


COUNT = """
import sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from raydist.cluster.resources import free_resources, node_resources

quiet = {"log_to_driver": False, "logging_level": "ERROR"}
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], namespace="n", **quiet)

@ray.remote(num_cpus=0.5)
class Busy:
    def ready(self):
        return True

for node in ray.nodes() if sys.argv[3:] else ():
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options = {"scheduling_strategy": place, "lifetime": "detached", "name": node["NodeID"]}
    ray.get(Busy.options(**options).remote().ready.remote())
print("counted", len(node_resources()), len(free_resources([])))
"""


def test_a_node_that_is_cut_off_or_to_be_taken_away_is_no_room(hosts: Hosts) -> None:
    """Ray holds both for alive, the second for as long as something runs there. The last on these hosts."""
    ensure(hosts, "one", "two")
    gcs = f"{hosts['head'].address}:{GCS_PORT}"

    def counted(*busy: str) -> tuple[int, int]:
        """Nodes that are alive for Ray, and those with room. busy: let something run on each."""
        told = hosts["head"].run("python", "-c", COUNT, gcs, hosts["head"].address, *busy)
        found = re.search(r"counted (\d+) (\d+)", told.stdout)
        assert found, told.stdout
        return int(found[1]), int(found[2])

    assert counted("busy") == (3, 3)
    nodes = {node["nodeManagerAddress"]: node["nodeId"] for node in hosts.nodes() or ()}
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    drain = ["--node-id", nodes[hosts["one"].address], "--deadline-remaining-seconds", "600", *why]
    asked = hosts["one"].run("ray", "drain-node", "--address", gcs, *drain)
    assert asked.returncode == 0, asked.stdout
    assert counted() == (3, 2)
    hosts["two"].unplug()
    alive, with_room = counted()
    assert with_room == 1 and alive >= 2  # on a slow machine Ray may have noticed by then
    hosts["two"].plug()
    for name in ("one", "two"):
        hosts[name].kill()
