"""Check cluster files, and bring clusters up and down by Ray's launcher or by kubectl."""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raydist import files
from raydist.cluster.token import TOKEN, make_token
from raydist.errors import ClusterError, JobError
from raydist.job.load import key_lines
from raydist.job.values import KeyPath

MODE = "RAY_AUTH_MODE=token"
UNSAFE = "a cluster without authentication runs anybody's code, and is refused: "
CHECK = "mend these lines; raydist cluster validate FILE checks without starting anything"


def load_cluster(path: str) -> dict[str, Any]:
    """The cluster in the file. Raises ClusterError with every problem, each with its line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = dict(key_lines(yaml.compose(text, Loader=yaml.SafeLoader), ()))
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, JobError) as error:
        raise ClusterError(f"cannot read the cluster file {path}", why=str(error)) from error
    if not isinstance(values, dict):
        raise ClusterError("a cluster is a mapping of keys to values", where=path)
    if problems := sorted((_line(lines, at), *told) for at, *told in _problems(values)):
        told = [f"  {path}:{line}: {key}: {text}" for line, key, text in problems]
        raise ClusterError("\n".join([f"{len(told)} problem{'s' * (len(told) > 1)}", *told]), fix=CHECK)
    return values


def _line(lines: dict[KeyPath, int], path: KeyPath) -> int:
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


def _problems(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
    """(key path, the same dotted, what is wrong) of each."""
    ray_job = values.get("kind") == "RayJob"
    if not ray_job and "kind" in values:
        yield ("kind",), "kind", f"{values['kind']!r} is not RayJob"
        return
    for path, text in (*_by_schema(values, ray_job), *(() if ray_job else _by_sense(values))):
        yield path, ".".join(map(str, path)) or "cluster", text


def _by_schema(values: dict[str, Any], ray_job: bool) -> Iterator[tuple[KeyPath, str]]:
    import jsonschema

    local = (values.get("provider") or {}) == {} or values["provider"].get("type") == "local"
    if not ray_job and local:  # the launcher takes it there, and out before it applies the schema
        values = {key: value for key, value in values.items() if key != "min_workers"}
    for error in jsonschema.Draft7Validator(schema_of(ray_job)).iter_errors(values):
        path, known = tuple(error.absolute_path), list(error.schema.get("properties", ()))
        if error.validator == "additionalProperties":
            for key in set(error.instance) - set(known):
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
                yield (*path, key), f"unknown key; {hint}"
        elif "authOptions" in (*path, *error.message.split("'")):
            yield path, f"{UNSAFE}write rayClusterSpec: {{authOptions: {{mode: token}}}}"
        else:
            yield path, error.message


def schema_of(ray_job: bool) -> Any:
    """Ours has what KubeRay knows of a RayJob; the other is Ray's own."""
    import ray.autoscaler

    ours, rays = Path(__file__).parent / "rayjob-schema.json", Path(ray.autoscaler.__file__).parent
    return files.read_json(ours if ray_job else rays / "ray-schema.json")


def _by_sense(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What the schema does not see."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [str(command) for command in values.get(key) or ()]
        starts = [command for command in commands if "ray start" in command]
        if not starts or not all(MODE in command for command in starts):
            yield (key,), f"{UNSAFE}put {MODE} before `ray start`, as in cluster/local.yaml"
        if any("RAY_AUTH_TOKEN=" in command for command in commands):
            yield (key,), f"a token on a command line is seen by all; ship it by file_mounts, as {TOKEN}"
    if TOKEN not in (values.get("file_mounts") or {}):
        yield ("file_mounts",), f"the token does not reach the machines: add {TOKEN}: {TOKEN}"
    types = values.get("available_node_types")
    if types and (head := values.get("head_node_type")) not in types:
        yield ("head_node_type",), f"{head} is not one of available_node_types: {', '.join(types)}"


def up(path: str) -> None:
    """Start the cluster, or bring it up to date with its file. Makes the token if there is none."""
    values = load_cluster(path)
    if values.get("kind") == "RayJob":
        _kubectl("apply", "-f", path)
        return
    make_token(Path(TOKEN))
    mounts = values.get("file_mounts") or {}
    if absent := [str(here) for here in mounts.values() if not Path(str(here)).expanduser().exists()]:
        raise ClusterError(
            f"file_mounts names what is not here: {', '.join(absent)}",
            where=path,
            fix="run this from the root of a checkout of raydist, or mend the paths",
        )
    _ray("up", "-y", path)


def down(path: str) -> None:
    """End the cluster; what is on the storage stays."""
    if load_cluster(path).get("kind") == "RayJob":
        _kubectl("delete", "-f", path)
    else:
        _ray("down", "-y", path)


def status(path: str) -> None:
    """Print the nodes and their resources."""
    if load_cluster(path).get("kind") == "RayJob":
        _kubectl("get", "-f", path, "-o", "wide")
    else:
        _ray("exec", path, f"{MODE} ray status")


_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def _ray(*arguments: str) -> None:
    _run([*_RAY, *arguments], f"ray {' '.join(arguments)}")


def _kubectl(*arguments: str) -> None:
    if shutil.which("kubectl") is None:
        raise ClusterError(
            "a RayJob needs kubectl, which is not on PATH", fix="install kubectl, and give it a context"
        )
    _run(["kubectl", *arguments], f"kubectl {' '.join(arguments)}")


def _run(command: list[str], name: str) -> None:
    """Its output goes where ours goes."""
    if code := subprocess.run(command, check=False).returncode:
        raise ClusterError(f"{name} ended with status {code}", why="what it printed stands above")
