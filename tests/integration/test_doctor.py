"""`raydist doctor` on a healthy host, and then with a second one where five things are wrong at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import yaml

from raydist.cluster import doctor as checks
from raydist.cluster.checks import no_answer
from raydist.cluster.doctor import require_healthy
from raydist.errors import ClusterError
from raydist.job.load import build_job
from tests.hosts import OBJECT_STORE_BYTES, PROGRAMS, ROOT, Host, Hosts, can_run


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := can_run():
        pytest.skip(reason)
    with Hosts("head", "other", "laptop") as hosts:
        hosts.start_head(hosts["head"], num_cpus=2)
        yield hosts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hosts share: the storage of runs, and a folder of models."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "models" / "base").mkdir(parents=True)
    (folder / "models" / "base" / "config.json").write_text("{}")
    return folder


def write_job(shared: Path, num_workers: int) -> str:
    job = {
        "name": "j",
        "storage": str(shared / "runs"),
        "model": {"base": str(shared / "models" / "base")},
        "corpus": {"sources": {"text": {"path": str(shared / "text.jsonl")}}},
        "train": {"max_steps": 1},
        "scaling": {"num_workers": num_workers, "cpus_per_worker": 1},
    }
    path = shared / f"{num_workers}.yaml"
    path.write_text(yaml.safe_dump(job))
    return str(path)


def doctor(
    hosts: Hosts, *arguments: str, address: str = "", env: dict[str, str] | None = None
) -> tuple[int, str]:
    """From a host that is no node of the cluster, unless the address is Ray's."""
    command = ("raydist", "doctor", *arguments, "--address", address or hosts.dashboard)
    done = hosts["laptop" if not address.endswith("6379") else "head"].run(*command, env=env)
    assert hosts.token.read_text() not in done.stdout and "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


def test_a_healthy_cluster(hosts: Hosts, shared: Path) -> None:
    code, told = doctor(hosts, write_job(shared, 1))
    assert code == 0 and "WRONG" not in told, told
    for part in (
        "only those who have the token",
        "the same versions on 1 nodes: Python",
        "clocks within",
        "/dev/shm holds",
    ):
        assert part in told
    assert f"storage {shared / 'runs'} is written and read by 1 nodes" in told
    assert "models/base is on 1 nodes" in told
    assert "1 workers of 1 CPUs, and 1 CPU for the data, fit on nodes of [2] CPUs" in told
    assert not list((shared / "runs").iterdir())  # no probe is left


def test_from_a_node_by_rays_own_address_without_a_job(hosts: Hosts) -> None:
    assert hosts.head is not None
    code, told = doctor(hosts, "--json", address=f"{hosts.head.address}:6379")
    findings = orjson.loads(told[told.index("{") :])["findings"]
    assert code == 0 and len(findings) == 4 and all(finding["ok"] for finding in findings), told


def test_a_wrong_token_no_token_and_no_cluster_are_told_apart(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    nowhere = f"http://{hosts['laptop'].address}:8265"
    for path, address, expected in [
        (str(tmp_path / "wrong"), "", "does not accept the token"),
        (str(tmp_path / "none"), "", "this machine has no token"),
        (str(hosts.token), nowhere, f"no Ray cluster answers at {nowhere}"),
    ]:
        env = {"RAY_AUTH_TOKEN_PATH": path, "HOME": str(tmp_path)}
        code, told = doctor(hosts, address=address, env=env)
        assert code == 8 and expected in told, told


def test_a_cluster_without_authentication_is_refused(hosts: Hosts) -> None:
    with Hosts("open") as others:
        others.start_head(others["open"], env={"RAY_AUTH_MODE": "disabled"})
        done = others["open"].run("raydist", "doctor", "--address", others.dashboard)
    assert done.returncode == 8 and "without authentication: its mode is disabled" in done.stdout, done.stdout
    assert "RAY_AUTH_MODE=token" in done.stdout


def start_with_faults(hosts: Hosts, host: Host, shared: Path, folder: Path) -> None:
    """The mounts are the host's own: each `ip netns exec` has a mount namespace."""
    fake = folder / "bitsandbytes-0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.1\n")
    temporary = Path(host.environment["RAY_TMPDIR"])
    temporary.mkdir()
    assert hosts.head is not None
    start = [
        f"mount -t tmpfs tmpfs {shared / 'runs'} && mount -t tmpfs tmpfs {shared / 'models'}",
        "mount -t tmpfs -o size=20m tmpfs /dev/shm",
        f"exec {PROGRAMS / 'ray'} start --block --address={hosts.head.address}:6379 --num-cpus=2"
        f" --node-ip-address={host.address} --temp-dir={temporary}"
        f" --object-store-memory={OBJECT_STORE_BYTES}",
    ]
    with (temporary / "start.txt").open("ab") as told:
        environment = {"PYTHONPATH": f"{folder}:{ROOT}"}
        command = ("sh", "-c", " && ".join(start))
        hosts.started.append(host.popen(*command, env=environment, stdout=told, stderr=told))
    hosts.wait_for_nodes(2)


def test_five_faults_are_told_at_once(hosts: Hosts, shared: Path, tmp_path: Path) -> None:
    other = hosts["other"]
    start_with_faults(hosts, other, shared, tmp_path)
    code, told = doctor(hosts, write_job(shared, 9), "--json")
    wrong = [f for f in orjson.loads(told)["findings"] if not f["ok"]]
    assert code == 8 and len(wrong) == 5, told
    for what, where, fix in [
        ("bitsandbytes 0.1, not 0.", other.address, "install requirements.lock"),
        ("/dev/shm has 21 MB free, the object store needs 1", other.address, "--shm-size"),
        (f"storage {shared / 'runs'} is not shared", other.address, "mount the same file system"),
        (f"no folder {shared / 'models' / 'base'}", other.address, "copy it there"),
        ("the job does not fit: 9 workers of 1 CPUs", "scaling", "scaling.num_workers to 3 or less"),
    ]:
        (finding,) = [f for f in wrong if f["what"].startswith(what)]
        assert where in finding["where"] and fix in finding["fix"] and finding["why"], finding
    assert not list((shared / "runs").iterdir())


def test_one_error_holds_all_of_it(shared: Path, ray_local: None) -> None:
    """`require_healthy`, on the Ray of this process."""
    job = yaml.safe_load(Path(write_job(shared, 9)).read_text()) | {"model": {"base": "/no/such/model"}}
    with pytest.raises(ClusterError) as told:
        require_healthy("auto", build_job(job))
    text = str(told.value)
    assert text.startswith("2 things are wrong with the cluster at auto"), text
    assert "no folder /no/such/model" in text and "9 workers" in text and told.value.exit_code == 8


def hang(key: str) -> None:
    time.sleep(60)


def fail(key: str) -> None:
    raise OSError("no space is left")


def test_a_node_that_hangs_or_fails_is_told_and_does_not_hang_the_checks(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(checks, "NODE_SECONDS", 2.0)
    key = ray.get_runtime_context().get_node_id()
    late = checks._run_on_nodes({"node a": key}, hang)["node a"]
    assert isinstance(late, TimeoutError) and "no answer within 2 s" in str(no_answer("node a", late))
    monkeypatch.setattr(checks, "NODE_SECONDS", 60.0)  # a worker may have to start first
    failed = checks._run_on_nodes({"node a": key, "node b": "0" * len(key)}, fail)
    assert "no space is left" in str(no_answer("node a", failed["node a"]))
    assert isinstance(failed["node b"], Exception)
