"""Examine a cluster on every node before anything is spent, and tell all that is wrong, each with its cure.

From outside, by the dashboard's address, the same examination runs as a Ray job on the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist import files
from raydist.cluster import checks
from raydist.cluster.checks import SHARED_MEMORY, Finding
from raydist.cluster.connect import ENVIRONMENT, no_way_in, ray_session
from raydist.cluster.remote import READY_SECONDS, connect, patiently, send
from raydist.errors import ClusterError
from raydist.job.load import job_yaml
from raydist.job.schema import Job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "bitsandbytes")
NODE_SECONDS = 30.0
"""A node that answers no sooner is hung: on its storage, as a rule."""
AGAIN = "give the command again: so far the cluster was only looked at"


def require_healthy(address: str, job: Job | None = None) -> None:
    """Raises one ClusterError with everything that is wrong."""
    wrong = [finding for finding in examine(address, job) if not finding.ok]
    if wrong:
        what = f"{len(wrong)} thing{'s are' if len(wrong) > 1 else ' is'} wrong with the cluster at {address}"
        fix = "mend these; raydist doctor checks without starting a run"
        raise ClusterError("\n".join([what, *map(str, wrong)]), fix=fix)


def examine(address: str, job: Job | None = None) -> list[Finding]:
    """Every finding. `address`: the dashboard's, from anywhere; or Ray's, from a node of the cluster.

    The paths of `job` are absolute.
    """
    if address.startswith(("http://", "https://")):
        return _by_job(address, job)
    with ray_session(1, 1, address):
        return _examine_here(job)


# --- from outside: the same as a job --------------------------------------------------------------


def _by_job(address: str, job: Job | None) -> list[Finding]:
    import raydist

    if not (open_to_all := _authentication(address)).ok:
        return [open_to_all]
    client = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        if job:
            files.write_text(Path(folder) / "job.yaml", job_yaml(job))
        environment = {"working_dir": folder, "py_modules": [str(Path(raydist.__file__).parent)]}
        submission = send(
            client,
            entrypoint=f"python -m raydist doctor {'job.yaml' if job else ''} --address auto --json",
            runtime_env={**environment, "env_vars": ENVIRONMENT},
            submission_id=f"raydist-doctor-{uuid.uuid4().hex[:12]}",
        )
    log = asyncio.run(_log_at_the_end(client, submission))
    if (start := log.find('{\n  "findings"')) < 0:
        raise ClusterError(
            "the checks did not run to their end on the cluster",
            why=log[-2000:].strip(),
            fix="install what is missing on the head: requirements.lock",
        )
    found = json.JSONDecoder().raw_decode(log[start:])[0]["findings"]
    return [Finding(**finding) for finding in found]


def _authentication(address: str) -> Finding:
    """Asked without a token. Where there is none, nothing else can run: raydist's processes insist on it."""
    url = f"{address.rstrip('/')}/api/authentication_mode"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - an address the user gave
            return checks.authentication(json.load(answer)["authentication_mode"])
    except (OSError, ValueError, KeyError) as error:
        raise no_way_in(
            address, error, "start it, mend the address, or forward its port: ray dashboard FILE"
        ) from error


async def _log_at_the_end(client: JobSubmissionClient, submission: str) -> str:
    deadline = time.monotonic() + READY_SECONDS + 4 * NODE_SECONDS
    while not (job := await patiently(client, client.get_job_info, submission, AGAIN)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(submission)
            break
        await asyncio.sleep(0.2)
    return str(await patiently(client, client.get_job_logs, submission, AGAIN)) or str(job.message)


# --- from inside ----------------------------------------------------------------------------------


def _examine_here(job: Job | None) -> list[Finding]:
    import ray
    from ray._private.worker import get_dashboard_url

    told = [_authentication(f"http://{url}")] if (url := get_dashboard_url()) else []
    if told and not told[0].ok:
        return told
    alive = [node for node in ray.nodes() if node["Alive"]]
    ids = {f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})": node["NodeID"] for node in alive}
    driver = next(name for name, key in ids.items() if key == ray.get_runtime_context().get_node_id())
    nodes, silent = _ask(ids, _own_storage(job) if job else "", _models(job))
    told += [checks.hung(name, error) for name, error in silent.items()]
    if nodes:
        told += [*checks.versions(nodes, versions()), *checks.clocks(nodes)]
        told += checks.shared_memory(nodes)
    if job and driver in nodes:
        told += checks.storage(_own_storage(job), nodes, driver)
        told += checks.models(_models(job), nodes)
    if job:
        told.append(checks.resources(job, [node["Resources"] for node in alive], _may_grow_to()))
    return told


def _own_storage(job: Job) -> str:
    """Made on this node only: on another one it is there if it is shared."""
    folder = Path(job.storage).expanduser().absolute()
    with contextlib.suppress(OSError):  # writing to it tells the reason
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _models(job: Job | None) -> list[str]:
    named = (job.model.base, job.model.tokenizer) if job else ()
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))


def _ask(ids: dict[str, str], storage: str, models: list[str]) -> tuple[checks.Nodes, dict[str, Exception]]:
    """What each node says, in two rounds: all have written before any reads; and who is silent."""
    probe = f".raydist-probe-{uuid.uuid4().hex}-"
    first = _on_nodes(ids, look, storage, probe, models)
    ids = {name: ids[name] for name, told in first.items() if isinstance(told, dict)}
    second = _on_nodes(ids, look_again, storage, probe, ids)
    _on_nodes(ids, clear, storage, probe)
    both = {name: {**first[name], **told} for name, told in second.items() if isinstance(told, dict)}
    for name, facts in both.items():
        facts |= {"clock": _clock_offset(ids[name]), "object_store": _object_store(ids[name])}
    silent = {**first, **second}
    return both, {name: told for name, told in silent.items() if isinstance(told, Exception)}


def _on_nodes(ids: dict[str, str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `function(id, *arguments)` gives on each node; an exception where it gives nothing."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for name, key in ids.items():
        there = NodeAffinitySchedulingStrategy(key, soft=False)
        asked[task.options(scheduling_strategy=there).remote(key, *arguments)] = name
    if not asked:
        return {}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
    told: dict[str, Any] = {}
    for answer in ready:
        try:
            told[asked[answer]] = ray.get(answer)
        except RayError as error:
            told[asked[answer]] = error
    for answer in late:
        ray.cancel(answer, force=True)
        told[asked[answer]] = TimeoutError(f"no answer within {NODE_SECONDS:g} s")
    return told


def _clock_offset(key: str) -> float:
    """Seconds by which a node's clock is surely off this one: half of the round trip is in doubt."""
    start = time.time()
    told = _on_nodes({"": key}, clock)[""]
    end = time.time()
    if not isinstance(told, float):
        return 0.0
    return max(0.0, abs(told - (start + end) / 2) - (end - start) / 2)


def _object_store(key: str) -> int:
    """Bytes that a node's object store may still take."""
    from ray._private.state import available_resources_per_node

    return int(available_resources_per_node().get(key, {}).get("object_store_memory", 0))


def _may_grow_to() -> float:
    """CPUs at most, where Ray's autoscaler adds nodes."""
    from ray._private.state import state

    return float((state.get_max_resources_from_cluster_config() or {}).get("CPU", 0))


# --- on a node ------------------------------------------------------------------------------------


def look(key: str, storage: str, probe: str, models: list[str]) -> dict[str, Any]:
    """Writes a probe into the storage, under a temporary name first and then renamed."""
    return {
        "versions": versions(),
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).free if Path(SHARED_MEMORY).is_dir() else 0,
        "storage": _write(Path(storage), f"{probe}{key}") if storage else "",
        "models": {name: presence(name) for name in models},
    }


def look_again(key: str, storage: str, probe: str, ids: dict[str, str]) -> dict[str, Any]:
    """By name: an NFS client may answer a listing, unlike a name never asked for, from its cache."""
    unseen = {name for name, other in ids.items() if storage and not _reads(Path(storage, probe + other))}
    return {"unseen": unseen}


def clear(key: str, storage: str, probe: str) -> None:
    if storage:
        Path(storage, f"{probe}{key}").unlink(missing_ok=True)


def clock(key: str) -> float:
    return time.time()


def versions() -> dict[str, str]:
    """By name; "" for what is not installed. Nothing is imported."""
    installed = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = ""
    return installed


def _write(folder: Path, probe: str) -> str:
    """Why it cannot be written; "" when it can."""
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
    """Where a node would take a model from: folder, cache, hub, or "" for nowhere."""
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
