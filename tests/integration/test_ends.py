"""Whatever is killed, stopped or full: the run says so, and ends in the undisturbed bytes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydist.folder import RunFolder
from tests.weights import weight_hash
from tests.whole_run import finish, folder_of, start, wait_for_step, workers, written

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def the_process(driver: subprocess.Popen[str], name: str) -> psutil.Process:
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() == name or name in " ".join(child.cmdline())[:100]:
                return child
    raise AssertionError(f"no process {name}")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("TrainController", "a worker was lost; going on from the last checkpoint"),
        ("raylet", "Ray was lost; going on from the last checkpoint (Ray's raylet"),
        ("gcs_server", "Ray was lost; going on from the last checkpoint (Ray's GCS"),
    ],
)
def test_a_killed_part_of_ray_costs_an_attempt(
    whole: dict[str, Any], undisturbed: tuple[RunFolder, str], part: str, told: str
) -> None:
    job = {**whole, "name": f"without-{part}"}
    process = start(job)
    wait_for_step(folder_of(job), 12, process)
    the_process(process, part).kill()
    code, output = finish(process, 480)
    assert code == 0 and told in output and "Traceback" not in output, output
    assert len(output.splitlines()) < 90, output  # Ray's own report is in a file
    assert weight_hash(folder_of(job).model) == weight_hash(undisturbed[0].model)


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_preparing_goes_on_with_a_new_ray(
    whole: dict[str, Any], undisturbed: tuple[RunFolder, str], tmp_path: Path, part: str
) -> None:
    job = {**whole, "name": "prepared", "storage": str(tmp_path)}
    process, folder = start(job), folder_of(job)
    while folder.status().get("state") != "preparing":
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    the_process(process, part).kill()
    code, output = finish(process, 480)
    assert code == 0 and "Ray was lost; going on with the preparation" in output, output
    assert "Traceback" not in output, output
    assert weight_hash(folder.model) == weight_hash(undisturbed[0].model)


GCS_CALLS = """
import os, signal, threading, time
import psutil
from raydist.cluster.connect import ray_session
from raydist.cluster.resources import node_resources
from raydist.errors import ClusterLost

def call():
    import ray
    calls.append(time.monotonic())
    while len(calls) == 1:
        ray.available_resources()
    return "on the new Ray"

def kill():
    gcs = [each for each in psutil.Process().children(recursive=True) if each.name() == "gcs_server"]
    gcs[0].kill()

calls = []
with ray_session(1, 1) as session:
    threading.Timer(2, kill).start()
    print(session.do_again(call, "work", 1, print), flush=True)
    time.sleep(65)
    kill()
    try:
        node_resources()
    except ClusterLost as error:
        print(error.what)
"""


def test_a_call_to_a_lost_gcs_does_not_end_the_process_later() -> None:
    """Ray would end it after 60 s, on whatever Ray it works by then. To ask a lost one is an error."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", GCS_CALLS], capture_output=True, text=True, check=False, env=environment
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and said[-2] == "on the new Ray", done.stdout + done.stderr
    assert re.fullmatch(r"Ray's GCS \(process \d+\) has ended", said[-1]), done.stdout + done.stderr


def test_a_lost_controller_counts_as_a_failure(whole: dict[str, Any], undisturbed: object) -> None:
    job = {**whole, "name": "no-failures", "scaling": {"num_workers": 2, "max_failures": 0}}
    process = start(job)
    wait_for_step(folder_of(job), 3, process)
    the_process(process, "TrainController").kill()
    code, output = finish(process)
    assert code == 7 and "lost a worker 1 times, and scaling.max_failures is 0" in output, output
    assert "Traceback" not in output and folder_of(job).status()["state"] == "failed"
    (named,) = [line.split("where: ")[1] for line in output.splitlines() if "  where: " in line]
    assert "ActorDiedError" in Path(named).read_text()


def test_a_stopped_worker_is_said_its_stacks_are_written_and_the_run_goes_on(
    whole: dict[str, Any], undisturbed: tuple[RunFolder, str]
) -> None:
    job = {**whole, "name": "stopped-worker", "scaling": {"num_workers": 2, "hang_timeout": 25}}
    process = start(job)
    wait_for_step(folder_of(job), 12, process)
    workers(process)[0].send_signal(signal.SIGSTOP)
    code, output = finish(process, 480)
    assert code == 0 and "gave no sign of life" in output and "the workers hung: no step for" in output, (
        output
    )
    assert weight_hash(folder_of(job).model) == weight_hash(undisturbed[0].model)
    stacks = list(folder_of(job).ranks(1).glob("*.txt"))
    assert any("all_reduce" in path.read_text() for path in stacks)  # the other rank waited for it


FULL = """
set -e
mount -t tmpfs -o size=60m none "$1/runs"
cp "$2" "$1/runs/job.yaml"; cp -r "$3" "$1/runs/"
free=$(df --output=avail -k "$1/runs" | tail -1)
head -c $(((free - 2500) * 1024)) /dev/zero > "$1/runs/ballast"
code=0; "$4" -m raydist train "$1/runs/job.yaml" || code=$?
echo "first: $code"; cat "$1/runs/full/status.json"; rm "$1/runs/ballast"
"$4" -m raydist train "$1/runs/job.yaml"
cp -r "$1/runs/full/model" "$1/model"
"""


def test_a_full_disk_is_said_and_the_same_command_goes_on_once_there_is_room(
    whole: dict[str, Any], undisturbed: tuple[RunFolder, str], tmp_path: Path
) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this machine has no namespaces")
    (tmp_path / "runs").mkdir()
    job = written({**whole, "name": "full"})
    logs = Path(whole["storage"]) / "tokens"
    Path(tmp_path, "job.yaml").write_text(
        Path(job).read_text().replace(whole["storage"], str(tmp_path / "runs"))
    )
    files = [str(tmp_path / "job.yaml"), str(logs)]
    done = subprocess.run(
        [*namespace, "bash", "-c", FULL, "bash", str(tmp_path), *files, sys.executable],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "first: 9" in done.stdout and "no space is left on the disk" in done.stdout, done.stdout
    assert '"state": "failed"' in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert weight_hash(tmp_path / "model") == weight_hash(undisturbed[0].model)
