"""A run in a bucket, on an S3 server of the tests' own: it ends as in a folder, whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydist.bucket import mirror, objects
from raydist.folder import RunFolder, find_run, runs_in
from raydist.sealed import read_sealed_lines
from tests import s3
from tests.weights import weight_hash
from tests.whole_run import (
    finish,
    folder_of,
    kill_everything,
    losses,
    start,
    start_prepare,
    start_tune,
    submit,
    wait_for_step,
    whole_job,
    write_corpus,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3.serving() as port:
        yield port


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The undisturbed run in a folder."""
    job = whole_job(corpus, tmp_path_factory.mktemp("local"))
    code, output = submit(job)
    assert code == 0, output
    return RunFolder(Path(job["storage"]) / job["name"])


@pytest.fixture
def job(
    corpus: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """The same run in a bucket, and the environment of a node with an empty cache."""
    for name, value in s3.environment(server, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    objects.open_bucket.cache_clear()
    yield {**whole_job(corpus, tmp_path), "storage": f"s3://{s3.BUCKET}/{tmp_path.name}/runs"}
    objects.open_bucket.cache_clear()


def as_the_local_run(job: dict[str, Any], local: RunFolder) -> None:
    """Equal losses, tokens and weights, as another node reads them from the bucket."""
    shutil.rmtree(os.environ["RAYDIST_CACHE"])
    objects.open_bucket.cache_clear()
    found = find_run(f"{job['storage']}/{job['name']}")
    assert found.status()["state"] == "finished"
    assert losses(found) == losses(local)
    found.fetch_model()
    assert weight_hash(found.model) == weight_hash(local.model)
    audits = [folder.data()["audit"] for folder in (found, local)]
    assert audits[0] == audits[1]


def test_killed_and_resumed_on_another_node_it_ends_as_in_a_folder(
    job: dict[str, Any], local: RunFolder, tmp_path: Path
) -> None:
    process = start(job)
    wait_for_step(folder_of(job), 20, process)
    second = start(job)
    code, output = finish(second)
    assert code == 6 and "another process is writing the run whole" in output
    kill_everything(process)
    process.wait()
    shutil.rmtree(os.environ["RAYDIST_CACHE"])
    code, output = submit(job)
    assert code == 0, output
    as_the_local_run(job, local)

    uri, here = f"{job['storage']}/{job['name']}", tmp_path / "here"
    command = [sys.executable, "-m", "raydist", "download", uri, str(here)]
    subprocess.run(command, check=True, capture_output=True)
    assert weight_hash(here / "model") == weight_hash(local.model)
    assert losses(RunFolder(here)) == losses(local)
    assert subprocess.run(command, capture_output=True).returncode == 6, "nothing is overwritten"


def test_a_preparation_that_is_killed_ends_in_the_same_bytes(
    job: dict[str, Any], local: RunFolder, tmp_path: Path
) -> None:
    """Killed twice, each time on a node whose disk is lost; what was committed is not made again."""
    tokens = mirror.place_of(job["storage"]) / "tokens"
    for least in (1, 3):
        process = start_prepare(job)
        while len(list(tokens.glob("*/slices/*.json"))) < least:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        kill_everything(process)
        process.wait()
        shutil.rmtree(os.environ["RAYDIST_CACHE"])
    code, output = finish(start_prepare(job))
    assert code == 0, output
    shutil.rmtree(os.environ["RAYDIST_CACHE"])
    mirror.pull(tokens)
    made = {path.relative_to(tokens): path.read_bytes() for path in tokens.rglob("*") if path.is_file()}
    there = local.path.parent / "tokens"
    assert made == {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}


def test_a_store_that_breaks_a_third_of_the_requests_changes_nothing(
    job: dict[str, Any], local: RunFolder, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = s3.Faults(1 / 3)
    with s3.faulty(server, faults) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        code, output = submit(job)
        assert code == 0, output
    assert sum(faults.count.values()) > 50 and all(faults.count.values())
    assert "requests to the bucket that were tried again" in output
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    as_the_local_run(job, local)


def test_a_sweep_in_a_bucket_goes_on_on_another_node(job: dict[str, Any]) -> None:
    """Its driver and all trials are killed, the node's disk is lost; trials that ended are not repeated."""
    job["tune"] = {
        "search": {"train.lr": {"grid": [1e-3, 3e-3, 5e-3]}},
        "concurrency": 1,
        "scheduler": "none",
    }
    job["train"]["max_steps"], job["scaling"]["num_workers"] = 10, 1
    process = start_tune(job)
    folder, uri = folder_of(job), f"{job['storage']}/{job['name']}"
    deadline = time.monotonic() + 240
    while len(read_sealed_lines(folder.refresh().trials_file)) < 3:  # the second trial has begun
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.5)
    kill_everything(process)
    process.wait()
    shutil.rmtree(os.environ["RAYDIST_CACHE"])
    code, output = finish(start_tune(job), 300)
    assert code == 0, output
    shutil.rmtree(os.environ["RAYDIST_CACHE"])
    objects.open_bucket.cache_clear()
    found = find_run(uri)
    assert found.state() == "finished" and found.best_file.exists()
    states = [record["state"] for record in read_sealed_lines(found.trials_file) if "state" in record]
    assert states == ["finished"] * 3
    trials = [run for run in runs_in(job["storage"]) if run.path.name.startswith(f"{job['name']}-")]
    assert [run.status()["state"] for run in trials] == ["finished"] * 3
