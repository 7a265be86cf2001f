"""Facts of nodes to findings: who is wrong, with numbers and a cure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raydist.cluster import checks
from raydist.cluster.checks import Finding
from raydist.cluster.doctor import _locked_probe, unseen_probes
from raydist.job.load import build_job
from raydist.job.schema import Job


def job(**scaling: Any) -> Job:
    values: dict[str, Any] = {
        "name": "j",
        "model": {"base": "some/model"},
        "corpus": {"sources": {"text": {"path": "a.txt"}}},
        "train": {"max_steps": 1},
        "scaling": scaling,
    }
    return build_job(values)


def nodes(**facts: list[Any]) -> checks.Nodes:
    """storage=["", ""] gives nodes a and b."""
    count = len(next(iter(facts.values())))
    return {"abcdef"[n]: {key: values[n] for key, values in facts.items()} for n in range(count)}


def wrong(told: Any) -> dict[str, Finding]:
    return {finding.where: finding for finding in told if not finding.ok}


@pytest.mark.parametrize(
    ("unseen", "errors", "named"),
    [
        ([{}, {}, {}], ["", "", ""], set()),
        ([{"c"}, {"c"}, {"a", "b"}], ["", "", ""], {"c"}),
        ([{"b", "c"}, {"a", "c"}, {"a", "b"}], ["", "", ""], {"b", "c"}),
        ([{}, {"c"}, {"b"}], ["", "", ""], {"b", "c"}),
        ([{"b"}, {"b"}, {"b"}], ["", "read-only", ""], {"b"}),
        ([{"a"}, {"a"}, {"a"}], ["full", "", ""], {"a"}),
    ],
)
def test_the_node_that_does_not_share_the_drivers_storage_is_named(
    unseen: list[Any], errors: list[str], named: set[str]
) -> None:
    """The driver is on a."""
    told = list(checks.storage("/s", nodes(unseen=unseen, storage=errors), "a"))
    assert set(wrong(told)) == named and (bool(named) or "3 nodes" in told[0].what)
    assert all(error in wrong(told)[n].what for n, error in zip("abc", errors, strict=True) if error)


def test_a_lock_that_another_node_gets_as_well_is_named(tmp_path: Path) -> None:
    """A thread of this process, whose own opening of the file is another holder, stands for a node."""
    asked = partial(unseen_probes, "a", str(tmp_path), "probe-", {})
    with _locked_probe(str(tmp_path), "probe-"):
        assert not asked()["lock_granted"]
        (tmp_path / "probe-lock").unlink()  # as a file system does whose nodes know nothing of each other's
        (tmp_path / "probe-lock").touch()
        assert asked()["lock_granted"]
    assert not list(tmp_path.iterdir()) and not asked()["lock_granted"]
    told = list(
        checks.storage("/s", nodes(unseen=[{}, {}], storage=["", ""], lock_granted=[False, True]), "a")
    )
    assert [(f.ok, f.where) for f in told] == [(False, "b")] and "locks" in told[0].what


@pytest.mark.parametrize(
    ("scaling", "cpus", "gpus", "grows", "why"),
    [
        ({"num_workers": 3}, [2, 2], [], 0, ""),
        ({"num_workers": 4}, [2, 2], [], 0, "no CPU is left for the data"),
        ({"num_workers": 2, "cpus_per_worker": 4}, [2, 2, 2, 2, 2], [], 0, "room for 0 workers"),
        ({"num_workers": 2, "use_gpu": True}, [8, 8], [1, 0], 0, "room for 1 workers"),
        ({"num_workers": 2, "use_gpu": True}, [8, 8], [2, 0], 0, ""),
        ({"num_workers": 2, "use_gpu": "auto"}, [8, 8], [0, 0], 0, ""),
        ({"num_workers": 8}, [2], [], 16, ""),
        ({"num_workers": 16}, [2], [], 16, "room for 2 workers"),
        ({"num_workers": [3, 8]}, [2, 2], [], 0, ""),
        ({"num_workers": [4, 8]}, [2, 2], [], 0, "no CPU is left for the data"),
        ({"num_workers": [5, 8]}, [2, 2], [], 0, "room for 4 workers"),
        ({"num_workers": [1, 8], "use_gpu": True}, [8, 8], [1, 0], 0, ""),
    ],
)
def test_a_job_fits_or_does_not(
    scaling: dict[str, Any], cpus: list[int], gpus: list[int], grows: float, why: str
) -> None:
    gpus = gpus or [0] * len(cpus)
    held = [{"CPU": float(c), "GPU": float(g)} for c, g in zip(cpus, gpus, strict=True)]
    told = checks.resources(job(**scaling), held, grows)
    assert told.ok == (not why) and why in told.why and str(cpus) in told.what
    assert told.ok or "scaling.num_workers" in told.fix


def test_models() -> None:
    facts = nodes(models=[{"m": "cache", "/m": "folder"}, {"m": "hub", "/m": ""}])
    (fetched,) = checks.models(["m"], facts)
    assert fetched.ok and fetched.what == "m will be downloaded on 1 nodes"
    assert wrong(checks.models(["/m"], facts))["b"].what == "no folder /m"
    facts = nodes(models=[{"m": "cache"}, {"m": ""}])
    assert "the hub does not answer" in wrong(checks.models(["m"], facts))["b"].what


def test_versions_clocks_memory_and_authentication() -> None:
    here = {"Python": "3.12.1", "ray": "2.60.0", "torch": ""}
    facts = nodes(versions=[here | {"torch": "2.13"}, {"Python": "3.11.0", "ray": "2.60.0", "torch": ""}])
    told = wrong(checks.versions(facts, here | {"torch": "2.13"}))
    assert list(told) == ["b"]
    assert told["b"].what == "Python 3.11.0, not 3.12.1; torch is not installed, not 2.13"
    assert list(wrong(checks.clocks(nodes(clock=[0.1, 61.0])))) == ["b"]
    facts = nodes(shared_memory=[2**30, 64 * 2**20], object_store=[2**29, 2**29])
    assert "67 MB free, the object store needs 537" in wrong(checks.shared_memory(facts))["b"].what
    assert checks.authentication("token").ok
    assert "without authentication" in checks.authentication("disabled").what
