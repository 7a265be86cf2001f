"""A run on two hosts that share no disk, with its text, tokens and checkpoints in a bucket; one host dies.

The hosts are network namespaces with a cache folder of their own each; the store is on a further one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from raydist.folder import RunFolder
from tests import s3
from tests.hosts import Hosts, can_run
from tests.integration.test_hosts import Submitted, training, victim
from tests.weights import weight_hash
from tests.whole_run import losses, whole_job, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(can_run()), reason=can_run())]

PORT = 5000
TEXT = f"s3://{s3.BUCKET}/text/words.jsonl"
BEGIN = """
import sys
from pathlib import Path
from raydist.bucket.objects import open_bucket
from tests import s3
s3.make_bucket(sys.argv[1], int(sys.argv[2]))
open_bucket(f"s3://{s3.BUCKET}").put("text/words.jsonl", Path(sys.argv[3]))
"""
QUERY = """
import sys
import duckdb, obstore, pyarrow as pa
from raydist.bucket.objects import open_bucket
bucket = open_bucket("s3://raydist-test")
keys = [each.key for each in bucket.listed("runs/tokens/") if each.key.endswith(".arrow")]
documents = pa.concat_tables(pa.ipc.open_file(bucket.get(key)[0]).read_all() for key in keys)
print(duckdb.sql("select sum(len(input_ids))::bigint from documents").fetchall()[0][0])
"""
"""Tokens of all shards, as DuckDB counts them."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A head and two more with one CPU each, a laptop, and a store with the text in it."""
    with Hosts("head", "one", "two", "laptop", "store", private=tmp_path / "cache") as hosts:
        store = hosts["store"].address
        for host in hosts:
            host.environment |= s3.environment(PORT, tmp_path / "cache", store)
        server = ["python", "-m", "moto.server", "--host", store, "--port", str(PORT)]
        hosts.started.append(hosts["store"].popen(*server, stdout=subprocess.DEVNULL))
        write_corpus(tmp_path / "words.jsonl")
        begun = hosts["store"].run("python", "-c", BEGIN, store, str(PORT), tmp_path / "words.jsonl")
        assert begun.returncode == 0, begun.stdout
        hosts.start_head(hosts["head"], num_cpus=1)
        for name in ("one", "two"):
            hosts.start_worker(hosts[name], num_cpus=1)
        hosts.wait_for_nodes(3)
        yield hosts


def job_of(storage: str | Path) -> dict[str, Any]:
    whole = whole_job(Path(), Path())
    return {
        **whole,
        "storage": str(storage),
        "corpus": {**whole["corpus"], "sources": {"words": {"path": TEXT}}},
        "scaling": {"num_workers": 2, "cpus_per_worker": 1},
        "tracking": {"mlflow": True},
    }


def test_a_host_dies_and_the_run_ends_as_on_one_machine(hosts: Hosts, tmp_path: Path) -> None:
    laptop, run = hosts["laptop"], Submitted(hosts, job_of("s3://raydist-test/runs"), tmp_path)
    run.wait_until(lambda: "step 12/40" in run.told(), "step 12")
    assert len(set(training(hosts))) == 2
    victim(hosts).kill()
    output = run.finish(400)
    assert "a worker was lost; going on from the last checkpoint" in output

    here, uri = tmp_path / "here", "s3://raydist-test/runs/whole"
    copied = laptop.run("raydist", "download", uri, here)
    assert copied.returncode == 0, copied.stdout
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(job_of(tmp_path / "alone")))
    alone = laptop.run("raydist", "train", tmp_path / "alone.yaml", timeout=300)
    assert alone.returncode == 0, alone.stdout
    local, found = RunFolder(tmp_path / "alone" / "whole"), RunFolder(here)
    assert losses(found) == losses(local)
    assert weight_hash(found.model) == weight_hash(local.model)
    assert found.data()["audit"] == local.data()["audit"]
    assert not list(tmp_path.glob("cache/*")), "nothing was written where hosts would share it"

    status = laptop.run("raydist", "status", uri, "--json", stderr=subprocess.DEVNULL)
    assert orjson.loads(status.stdout)["state"] == "finished"
    counted = laptop.run("python", "-c", QUERY, stderr=subprocess.DEVNULL)
    assert int(counted.stdout) == local.data()["audit"]["n_in"]
    check_others_read(here, steps=40)


def check_others_read(folder: Path, steps: int) -> None:
    """transformers and MLflow."""
    from mlflow import MlflowClient
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.num_parameters() > 0
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raydist")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(tracked.info.run_id, "loss")) >= steps
