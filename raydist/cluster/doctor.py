"""Check every node of a cluster before a run, and report each problem with its fix.

Given the dashboard's address, the same checks run as a Ray job on the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import platform
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist import files
from raydist.bucket.check import check_bucket
from raydist.cluster import checks
from raydist.cluster.checks import SHARED_MEMORY, Finding
from raydist.cluster.connect import ENVIRONMENT, SAFE_PATH, connection_error, ray_session
from raydist.cluster.remote import READY_SECONDS, ask_until_answered, connect, run_async, send
from raydist.cluster.resources import may_grow_to
from raydist.errors import ClusterError, StorageError
from raydist.job.load import job_yaml
from raydist.job.schema import Job
from raydist.places import uri_of
from raydist.storage import Storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "bitsandbytes")
NODE_SECONDS = 30.0
"""A node that has not answered by then hangs, most often on its storage."""
LOCK = "lock"
"""Ends the name of the probe that the driver locks."""
AGAIN = "repeat the command: so far the cluster was only checked"


def require_healthy(address: str, job: Job | None = None) -> None:
    """Raises one ClusterError with every problem of the cluster."""
    wrong = [finding for finding in examine(address, job) if not finding.ok]
    if wrong:
        what = f"{len(wrong)} thing{'s are' if len(wrong) > 1 else ' is'} wrong with the cluster at {address}"
        fix = "fix these; raydist doctor checks without starting a run"
        raise ClusterError("\n".join([what, *map(str, wrong)]), fix=fix)


def examine(address: str, job: Job | None = None) -> list[Finding]:
    """Every finding, good or bad. `job` has absolute paths.

    address: the dashboard's, from any machine; or Ray's own, from a node of the cluster.
    """
    if address.startswith(("http://", "https://")):
        return _examine_as_ray_job(address, job)
    with ray_session(1, 1, address):
        return _examine_here(job)


# --- from outside: a Ray job runs the checks ------------------------------------------------------


def _examine_as_ray_job(address: str, job: Job | None) -> list[Finding]:
    import raydist

    if not (authentication := _authentication(address)).ok:
        return [authentication]
    client = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        if job:
            files.write_text(Path(folder) / "job.yaml", job_yaml(job))
        environment = {"working_dir": folder, "py_modules": [str(Path(raydist.__file__).parent)]}
        submission = send(
            client,
            entrypoint=f"python -m raydist doctor {'job.yaml' if job else ''} --address auto --json",
            runtime_env={**environment, "env_vars": ENVIRONMENT | SAFE_PATH},
            submission_id=f"raydist-doctor-{uuid.uuid4().hex[:12]}",
        )
    output = run_async(_final_output(client, submission))
    if (start := output.find('{\n  "findings"')) < 0:
        raise ClusterError(
            "the checks did not finish on the cluster",
            why=output[-2000:].strip(),
            fix="install what is missing on the head: requirements.lock",
        )
    findings = json.JSONDecoder().raw_decode(output[start:])[0]["findings"]
    return [Finding(**finding) for finding in findings]


def _authentication(address: str) -> Finding:
    """Ask for the mode, which takes no token. Without authentication raydist's processes cannot join."""
    url = f"{address.rstrip('/')}/api/authentication_mode"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - an address the user gave
            return checks.authentication(json.load(answer)["authentication_mode"])
    except (OSError, ValueError, KeyError) as error:
        raise connection_error(
            address, error, "start it, correct the address, or forward its port: ray dashboard FILE"
        ) from error


async def _final_output(client: JobSubmissionClient, submission: str) -> str:
    deadline = time.monotonic() + READY_SECONDS + 4 * NODE_SECONDS
    while True:
        job = await ask_until_answered(client, client.get_job_info, submission, AGAIN)
        if job.status.is_terminal():
            break
        if time.monotonic() > deadline:
            client.stop_job(submission)
            break
        await asyncio.sleep(0.2)
    output = await ask_until_answered(client, client.get_job_logs, submission, AGAIN)
    return str(output) or str(job.message)


# --- from inside ----------------------------------------------------------------------------------


def _examine_here(job: Job | None) -> list[Finding]:
    import ray
    from ray._private.worker import get_dashboard_url

    findings = [_authentication(f"http://{url}")] if (url := get_dashboard_url()) else []
    if findings and not findings[0].ok:
        return findings
    alive = [node for node in ray.nodes() if node["Alive"]]
    ids = {f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})": node["NodeID"] for node in alive}
    driver = next(name for name, key in ids.items() if key == ray.get_runtime_context().get_node_id())
    nodes, errors = _node_facts(ids, _own_storage(job) if job else "", _models(job))
    findings += [checks.no_answer(name, error) for name, error in errors.items()]
    if nodes:
        findings += checks.versions(nodes, versions())
        findings += checks.clocks(nodes)
        findings += checks.shared_memory(nodes)
    if job and driver in nodes:
        findings += checks.storage(_own_storage(job), nodes, driver)
        findings += checks.models(_models(job), nodes)
    if job:
        findings.append(checks.resources(job, [node["Resources"] for node in alive], may_grow_to()))
    return findings


def _own_storage(job: Job) -> str:
    """The job's storage, created on this node only: other nodes have the folder if it is shared."""
    folder = Storage(job.storage).path.absolute()
    with contextlib.suppress(OSError):  # the check that writes to it reports the reason
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _models(job: Job | None) -> list[str]:
    named = (job.model.base, job.model.tokenizer) if job else ()
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))


def _node_facts(
    ids: dict[str, str], storage: str, models: list[str]
) -> tuple[checks.Nodes, dict[str, Exception]]:
    """The facts of each node, and the error of each node that gave none.

    Two rounds, so that every node has written its probe file before any node looks for them.
    """
    probe = f".raydist-probe-{uuid.uuid4().hex}-"
    first = _run_on_nodes(ids, first_facts, storage, probe, models)
    ids = {name: ids[name] for name, result in first.items() if isinstance(result, dict)}
    with _locked_probe(storage, probe):
        second = _run_on_nodes(ids, unseen_probes, storage, probe, ids)
    _run_on_nodes(ids, remove_probe, storage, probe)
    nodes = {name: {**first[name], **result} for name, result in second.items() if isinstance(result, dict)}
    for name, facts in nodes.items():
        facts |= {"clock": _clock_offset(ids[name]), "object_store": _object_store(ids[name])}
    results = {**first, **second}
    return nodes, {name: result for name, result in results.items() if isinstance(result, Exception)}


@contextlib.contextmanager
def _locked_probe(storage: str, probe: str) -> Iterator[None]:
    """This process holds a lock in the storage meanwhile, which nobody else must get."""
    path = Path(storage, f"{probe}{LOCK}")
    if not storage or uri_of(path) is not None or _write(path.parent, path.name):
        yield
        return
    with path.open("r+") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _run_on_nodes(ids: dict[str, str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Name -> the result of `function(id, *arguments)` on that node, or the exception that it ended with."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    names = {}
    for name, key in ids.items():
        node = NodeAffinitySchedulingStrategy(key, soft=False)
        names[task.options(scheduling_strategy=node).remote(key, *arguments)] = name
    if not names:
        return {}
    ready, late = ray.wait(list(names), num_returns=len(names), timeout=NODE_SECONDS)
    results: dict[str, Any] = {}
    for answer in ready:
        try:
            results[names[answer]] = ray.get(answer)
        except RayError as error:
            results[names[answer]] = error
    for answer in late:
        ray.cancel(answer, force=True)
        results[names[answer]] = TimeoutError(f"no answer within {NODE_SECONDS:g} s")
    return results


def _clock_offset(key: str) -> float:
    """Seconds by which a node's clock differs from this one at least; half of the round trip is uncertain."""
    start = time.time()
    node_time = _run_on_nodes({"": key}, clock)[""]
    end = time.time()
    if not isinstance(node_time, float):
        return 0.0
    return max(0.0, abs(node_time - (start + end) / 2) - (end - start) / 2)


def _object_store(key: str) -> int:
    """Bytes by which a node's object store may still grow."""
    from ray._private.state import available_resources_per_node

    return int(available_resources_per_node().get(key, {}).get("object_store_memory", 0))


# --- on a node ------------------------------------------------------------------------------------


def first_facts(key: str, storage: str, probe: str, models: list[str]) -> dict[str, Any]:
    """A node's facts so far. Writes its probe file into the storage."""
    return {
        "versions": versions(),
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).free if Path(SHARED_MEMORY).is_dir() else 0,
        "storage": _unusable(Path(storage), f"{probe}{key}") if storage else "",
        "models": {name: presence(name) for name in models},
    }


def unseen_probes(key: str, storage: str, probe: str, ids: dict[str, str]) -> dict[str, Any]:
    """The names of the nodes whose probe files this node does not see, and whether it gets the lock that the
    driver holds.

    Opens each file: an NFS client may answer a listing from its cache, but not a name that it never opened.
    """
    shared = storage and uri_of(Path(storage)) is None  # what one node writes to a bucket the others see
    unseen = {name for name, other in ids.items() if shared and not _reads(Path(storage, probe + other))}
    return {"unseen": unseen, "lock_granted": bool(shared) and _gets_lock(Path(storage, f"{probe}{LOCK}"))}


def _gets_lock(path: Path) -> bool:
    """False also where the file is not seen."""
    try:
        with path.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_probe(key: str, storage: str, probe: str) -> None:
    if storage:
        Path(storage, f"{probe}{key}").unlink(missing_ok=True)


def _unusable(folder: Path, probe: str) -> str:
    """Why this node cannot use the storage; empty if it can. A folder has a file named `probe` then."""
    if uri_of(folder) is None:
        return _write(folder, probe)
    try:
        check_bucket(folder)
    except StorageError as error:
        return f"{error.what} ({error.why})"
    return ""


def clock(key: str) -> float:
    return time.time()


def versions() -> dict[str, str]:
    """Package -> version, "" if it is not installed; and Python's. Imports none of them."""
    installed = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = ""
    return installed


def _write(folder: Path, probe: str) -> str:
    """Why the probe cannot be written; "" if it was."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files.write_text(folder / probe, probe)
    except OSError as error:
        return str(error)
    return ""


def _reads(probe: Path) -> bool:
    try:
        return probe.read_text() == probe.name
    except OSError:
        return False


def presence(name: str) -> str:
    """Where this node would load a model from: folder, cache or hub; "" if it cannot."""
    folder = Path(name).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        return "folder"
    if checks.is_path(name):
        return ""
    from huggingface_hub import constants, try_to_load_from_cache

    names = ("config.json", "tokenizer_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in names):
        return "cache"
    return "hub" if not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT) else ""


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - huggingface_hub's own setting
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
