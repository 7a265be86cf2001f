"""Runs on several hosts: network namespaces, each with its own Ray node, one of which dies in the middle.

The job is submitted from a host that is not in the cluster. All hosts see the storage, as hosts with a
shared file system do.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raydist import files
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.plan import make_plan
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import find_prepared
from raydist.track.records import read_metrics
from raydist.training.loop import train
from tests.hosts import GCS_PORT, Host, Hosts, can_run
from tests.whole_run import losses, reached, whole_job, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(can_run()), reason=can_run())]

STEPS = 24
MARKS = """
import pathlib, ray

def mark(text):
    (pathlib.Path({folder!r}) / ray.util.get_node_ip_address()).touch()
    return text
"""
"""A cleaning function of the user's: it goes along with the job, and tells on which hosts it ran."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head and two more, each with one CPU: no host has room for two training workers."""
    with Hosts("head", "one", "two", "laptop") as hosts:
        hosts.start_head(hosts["head"], num_cpus=1)
        hosts.start_worker(hosts["one"], num_cpus=1)
        hosts.start_worker(hosts["two"], num_cpus=1)
        hosts.wait_for_nodes(3)
        yield hosts


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    write_corpus(tmp_path / "text.jsonl")
    (tmp_path / "marks").mkdir()
    (tmp_path / "of_mine.py").write_text(MARKS.format(folder=str(tmp_path / "marks")))
    whole = whole_job(tmp_path / "text.jsonl", tmp_path / "runs")
    return {
        **whole,
        "name": "hosts",
        "corpus": {**whole["corpus"], "clean": ["of_mine:mark"], "slice_bytes": 10000},
        "train": {**whole["train"], "max_steps": STEPS, "global_batch_size": 12},
        "eval": {**whole["eval"], "eval_steps": STEPS},
    }


class Submitted:
    """`raydist submit` on the laptop, in the folder of the user's module."""

    def __init__(self, hosts: Hosts, job: dict[str, Any], place: Path | None = None) -> None:
        self.folder = RunFolder(Path(job["storage"]) / job["name"])
        self.place = place or Path(job["storage"]).parent
        (self.place / "job.yaml").write_text(yaml.safe_dump(job))
        command = ["raydist", "submit", "job.yaml", "--address", hosts.dashboard]
        self.process = hosts["laptop"].popen(*command, cwd=self.place)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line)

    def wait_for_step(self, step: int, attempt: int = 1, seconds: float = 240) -> None:
        self.wait_until(lambda: reached(self.folder, step, attempt), f"step {step}", seconds)

    def wait_until(self, done: Any, what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {what}\n{self.told()}"
            time.sleep(0.1)

    def told(self) -> str:
        return "".join(self.lines)

    def finish(self, seconds: float = 240) -> str:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.reader.join()
        assert code == 0, self.told()
        return self.told()


def training(hosts: Hosts) -> list[Host]:
    """The hosts on which a training worker is alive, one for each worker."""
    found = []
    for host in hosts:
        for pid in host.pids():
            try:
                found += [host] * ("RayTrainWorker" in "".join(psutil.Process(pid).cmdline()[:1]))
            except psutil.NoSuchProcess:
                continue
    return found


def victim(hosts: Hosts) -> Host:
    """A training host other than the head, on which the driver runs."""
    return next(host for host in training(hosts) if host is not hosts.head)


def check_unbroken(job: dict[str, Any], folder: RunFolder) -> None:
    """Every sample once and in order, and the losses of one process that was never disturbed."""
    kept: dict[int, dict[str, Any]] = {}
    for line in files.read_jsonl(folder.ledger_file):  # what a later attempt did again counts once
        kept = {stop: old for stop, old in kept.items() if stop <= line["samples"][0]}
        kept[line["samples"][1]] = line
    spans = [line["samples"] for line in kept.values()]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == STEPS * job["train"]["global_batch_size"]
    audit = folder.data()["audit"]
    assert audit["n_in"] == audit["n_trained"] + audit["n_held_out"] + audit["n_left"]
    assert sum(line["tokens"] for line in kept.values()) == audit["n_trained"] + audit["n_repeated"]
    alone, built = RunFolder(folder.path.parent / "alone"), build_job(job)
    prepared = find_prepared(built, folder.data()["pins"])
    train(attempt_spec(prepared, alone, make_plan(built, 1, None), 1))
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)


def seconds_lost(folder: RunFolder) -> float:
    """From the last record before the loss to the first step after it."""
    records = read_metrics(folder)
    before = max(record["time"] for record in records if record["attempt"] == 1)
    return min(r["time"] for r in records if r["attempt"] == 2 and r["kind"] == "train") - before


def test_a_killed_host_costs_seconds_and_no_sample(
    hosts: Hosts, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers on two of three hosts; one of those dies with all that runs on it; the two left go on."""
    run = Submitted(hosts, job)
    run.wait_for_step(10)
    assert len(set(training(hosts))) == 2
    victim(hosts).kill()
    output = run.finish()
    assert "a worker was lost; going on from the last checkpoint" in output
    assert "resumed at step 8 with 2 workers" in output
    listed = hosts["laptop"].run("ray", "job", "list", "--address", hosts.dashboard).stdout
    assert "raydist-hosts" in listed and hosts.token.read_text() not in listed + output
    assert len(list((run.place / "marks").iterdir())) >= 2, "one host alone prepared the corpus"
    check_unbroken(job, run.folder)
    with capsys.disabled():
        print(f" [{seconds_lost(run.folder):.1f} s lost at a killed host]", end="")


def test_a_run_waits_for_a_host_that_it_cannot_do_without(hosts: Hosts, job: dict[str, Any]) -> None:
    """Two of three hosts die: the head alone does not hold two workers, until one of them is back."""
    ensure_all(hosts)
    run = Submitted(hosts, job)
    run.wait_for_step(10)
    for name in ("one", "two"):
        hosts[name].kill()
    run.wait_until(lambda: "waiting up to 10 minutes for nodes: 1 of 2 CPUs" in run.told(), "wait", 150)
    hosts.start_worker(hosts["two"], num_cpus=1)
    output = run.finish(240)
    assert "resumed at step 8 with 2 workers" in output
    check_unbroken(job, run.folder)


def test_an_unplugged_host_is_given_up(
    hosts: Hosts, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing says that it is gone: it does not answer any more. Its processes live on, and its rank 0 holds
    the run's records until its collective times out: only then does the next attempt write."""
    ensure_all(hosts)
    run = Submitted(hosts, job)
    run.wait_for_step(10)
    lost = victim(hosts)
    lost.unplug()
    output = run.finish(450)
    lost.kill()
    lost.plug()
    assert "resumed at step 8 with 2 workers" in output
    check_unbroken(job, run.folder)
    with capsys.disabled():
        print(f" [{seconds_lost(run.folder):.1f} s lost at an unplugged host]", end="")


def ensure_all(hosts: Hosts) -> None:
    """Start the hosts again that an earlier test killed."""
    for name in ("one", "two"):
        if hosts[name].address not in hosts.alive() or not hosts[name].pids():
            hosts.start_worker(hosts[name], num_cpus=1)
    hosts.wait_for_nodes(3)


def test_a_notice_leads_to_a_checkpoint_and_the_run_goes_on_elsewhere(
    hosts: Hosts, job: dict[str, Any]
) -> None:
    """Ray drains a node for preemption, which dies at the deadline; regular checkpoints are far away."""
    ensure_all(hosts)
    job["train"]["max_steps"], job["checkpoint"]["save_steps"] = 400, 1000
    run = Submitted(hosts, job)
    run.wait_for_step(5)
    lost = victim(hosts)
    nodes = {node["nodeManagerAddress"]: node["nodeId"] for node in hosts.nodes() or ()}
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    until = ["--deadline-remaining-seconds", "20"]
    gcs = f"{hosts.head.address}:{GCS_PORT}"
    asked = lost.run("ray", "drain-node", "--address", gcs, "--node-id", nodes[lost.address], *why, *until)
    assert asked.returncode == 0, asked.stdout
    run.wait_until(lambda: run.told().count("s after it was asked for") == 2, "two checkpoints", 120)
    lost.kill()
    output = run.finish(400)
    assert re.search(r"will be taken away in \d+ s: a checkpoint is made now", output), output
    assert "is about to be taken away: one more checkpoint is made" in output
    commits = [r for r in read_metrics(run.folder) if r["kind"] == "commit"]
    first = [r["step"] for r in commits if r["attempt"] == 1]
    assert len(first) == 2 and f"resumed at step {first[1]} with 2 workers" in output
    assert commits[-1]["step"] == 400 and [*losses(run.folder)] == [*range(1, 401)]
