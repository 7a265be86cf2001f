"""Cluster files: the shipped ones are valid and explained; all that is wrong in one is told, with lines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from raydist.cli.clusters import cluster
from raydist.cluster.launch import load_cluster, schema_of
from raydist.errors import ClusterError

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "cluster").glob("*.yaml"))


def test_there_are_four() -> None:
    assert [path.stem for path in SHIPPED] == ["aws", "gcp", "kuberay", "local"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_cluster_is_valid(path: Path) -> None:
    result = CliRunner().invoke(cluster, ["validate", str(path)])
    assert result.exit_code == 0 and result.output == f"{path}: valid\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_cluster_is_explained(path: Path) -> None:
    """A comment stands on the key's line or on the line above."""
    text = path.read_text()
    lines = text.splitlines()
    keys = set(key_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    bare = {n for n in keys if "#" not in lines[n] and not lines[n - 1].lstrip().startswith("#")}
    assert len(keys) > 20 and not bare, [lines[n] for n in sorted(bare)]


def key_lines(node: yaml.Node) -> Iterator[int]:
    for value in node.value if isinstance(node, yaml.SequenceNode) else ():
        yield from key_lines(value)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield key.start_mark.line
        yield from key_lines(value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_ray_and_kubectl_read_a_shipped_cluster_as_we_do(path: Path) -> None:
    """Ray's own check, after its own defaults, of what `ray up` would be given."""
    if path.stem == "kuberay":
        job = load_cluster(str(path))["spec"]
        assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"} and job["backoffLimit"] > 0
        return
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load_cluster(str(path)))
    validate_config(prepared)
    for mount, here in prepared["file_mounts"].items():
        assert mount == here == "~/.ray/auth_token" or (ROOT / here).exists()


def written(path: Path, name: str, *changes: tuple[str, str]) -> str:
    """A shipped file with each first text replaced by the second."""
    text = (ROOT / "cluster" / f"{name}.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


def line_of(path: str, text: str) -> int:
    return next(n for n, line in enumerate(Path(path).read_text().splitlines(), 1) if text in line)


def test_all_that_is_wrong_is_told_at_once_with_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path / "c.yaml",
        "aws",
        ("upscaling_speed:", "upscaling_sped:"),
        ("max_workers: 2                  # machines", "max_workers: two                # machines"),
        ("head_node_type: head", "head_node_type: heed"),
        ("    resources: {} ", "    # "),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc"),
        ("  ~/.ray/auth_token: ~/.ray/auth_token", "  ~/x: README.md"),
    )
    result = CliRunner().invoke(cluster, ["validate", path, str(tmp_path / "absent.yaml")])
    told = result.output
    assert result.exit_code == 8
    for text, key, message in [
        ("upscaling_sped", "upscaling_sped", "unknown key; did you mean upscaling_speed?"),
        ("max_workers: two", "max_workers", "'two' is not of type 'integer'"),
        ("head_node_type", "head_node_type", "heed is not one of available_node_types: head, worker"),
        ("  head:", "available_node_types.head", "'resources' is a required property"),
        ("  worker:", "available_node_types.worker", "'resources' is a required property"),
        ("head_start_ray", "head_start_ray_commands", "put RAY_AUTH_MODE=token before `ray start`"),
        ("worker_start_ray", "worker_start_ray_commands", "everybody can read a token on a command line"),
        ("file_mounts", "file_mounts", "the token is not copied to the machines"),
    ]:
        assert any(
            line.strip().startswith(f"{path}:{line_of(path, text)}: {key}: ") and message in line
            for line in told.splitlines()
        ), (key, told)
    assert "10 problems" in told and "cannot read the cluster file" in told and "abc" not in told


def test_a_missing_section_and_rays_own_start_commands_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("cluster_name: c\n")
    with pytest.raises(ClusterError) as told:
        load_cluster(str(path))
    assert "'provider' is a required property" in str(told.value)
    assert str(told.value).count("without authentication") == 2 and told.value.exit_code == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((("mode: token", "mode: disabled"),), "without authentication"),
        ((("    authOptions:", "    # "), ("      mode: token", "      # ")), "without authentication"),
        ((("backoffLimit: 3               #", "backofLimit: 3  #"),), "did you mean backoffLimit?"),
        ((("suspend: false", "suspend: 3"),), "spec.suspend: 3 is not of type 'boolean'"),
        ((("groupName: workers", "name: workers"),), "workerGroupSpecs.0: 'groupName' is a required"),
        ((("    headGroupSpec:", "    headGroup:"),), "did you mean headGroupSpec?"),
        ((("kind: RayJob", "kind: RayService"),), "'RayService' is not RayJob"),
    ],
)
def test_a_wrong_ray_job_is_refused(
    tmp_path: Path, changes: tuple[tuple[str, str], ...], expected: str
) -> None:
    with pytest.raises(ClusterError) as told:
        load_cluster(written(tmp_path / "c.yaml", "kuberay", *changes))
    assert expected in str(told.value)


def test_a_local_cluster_may_say_its_least_number_of_machines(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "local", ("max_workers: 2 ", "min_workers: 2\nmax_workers: 2 "))
    assert load_cluster(path)["min_workers"] == 2


def test_the_table_of_a_ray_job_knows_what_kuberay_knows() -> None:
    spec = schema_of(ray_job=True)["properties"]["spec"]["properties"]
    assert {"submissionMode", "deletionStrategy", "entrypointNumGpus", "metadata"} < set(spec)
    assert set(spec["rayClusterSpec"]["properties"]["authOptions"]["properties"]) == {
        *("mode", "secretName", "enableK8sTokenAuth")
    }


def raydist(home: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "PATH": path or os.environ["PATH"]}
    command = [sys.executable, "-c", "from raydist.cli import main; main()", "cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def test_up_makes_a_token_for_its_owner_only_and_tells_what_it_cannot_copy(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "local", ("raydist/raydist: raydist ", "raydist/raydist: nowhere "))
    result = raydist(tmp_path, "up", path)
    token = tmp_path / ".ray" / "auth_token"
    assert result.returncode == 8 and "names files that do not exist: nowhere" in result.stderr, result
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) >= 32
    assert token.read_text() not in result.stdout + result.stderr


def test_a_ray_job_without_kubectl_is_a_clear_error(tmp_path: Path) -> None:
    for command in ("up", "down", "status"):
        result = raydist(tmp_path, command, "cluster/kuberay.yaml", path=str(tmp_path))
        assert result.returncode == 8 and "needs kubectl" in result.stderr, result
