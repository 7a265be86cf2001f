"""Check cluster files, and start and stop clusters with Ray's launcher or kubectl."""

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
from raydist.job.text import parse_yaml
from raydist.job.values import KeyPath
from raydist.limits import read_limited

MODE = "RAY_AUTH_MODE=token"
UNSAFE = "a cluster without authentication runs anybody's code, and is refused: "
CHECK = "fix these lines; raydist cluster validate FILE checks without starting anything"


def load_cluster(path: str) -> dict[str, Any]:
    """The cluster in the file. Raises ClusterError with every problem, each with its line."""
    try:
        values, lines = parse_yaml(read_limited(Path(path)), yaml.SafeLoader)
    except (OSError, ValueError, JobError) as error:
        raise ClusterError(f"cannot read the cluster file {path}", why=str(error)) from error
    if not isinstance(values, dict):
        raise ClusterError("a cluster is a mapping of keys to values", where=path)
    if problems := sorted((_line(lines, at), key, text) for at, key, text in _problems(values)):
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        reports = [f"  {path}:{line}: {key}: {text}" for line, key, text in problems]
        raise ClusterError("\n".join([count, *reports]), fix=CHECK)
    return values


def _line(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """The line of the key, or of the innermost section around it that has one."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


def _problems(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
    """(key path, the same with dots, message) of each problem."""
    ray_job = values.get("kind") == "RayJob"
    if not ray_job and "kind" in values:
        yield ("kind",), "kind", f"{values['kind']!r} is not RayJob"
        return
    for path, text in (*_by_schema(values, ray_job), *(() if ray_job else _beyond_schema(values))):
        yield path, ".".join(map(str, path)) or "cluster", text


def _by_schema(values: dict[str, Any], ray_job: bool) -> Iterator[tuple[KeyPath, str]]:
    import jsonschema

    local = (values.get("provider") or {}) == {} or values["provider"].get("type") == "local"
    if not ray_job and local:  # the launcher allows it here, and removes it before it applies the schema
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
    """The JSON schema: for a RayJob raydist's own, with the fields that KubeRay knows; else Ray's."""
    import ray.autoscaler

    if ray_job:
        return files.read_json(Path(__file__).parent / "rayjob-schema.json")
    return files.read_json(Path(ray.autoscaler.__file__).parent / "ray-schema.json")


def _beyond_schema(values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems that the schema cannot express."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [str(command) for command in values.get(key) or ()]
        starts = [command for command in commands if "ray start" in command]
        if not starts or not all(MODE in command for command in starts):
            yield (key,), f"{UNSAFE}put {MODE} before `ray start`, as in cluster/local.yaml"
        if any("RAY_AUTH_TOKEN=" in command for command in commands):
            yield (key,), f"everybody can read a token on a command line; copy it by file_mounts, as {TOKEN}"
    if TOKEN not in (values.get("file_mounts") or {}):
        yield ("file_mounts",), f"the token is not copied to the machines: add {TOKEN}: {TOKEN}"
    types = values.get("available_node_types")
    if types and (head := values.get("head_node_type")) not in types:
        yield ("head_node_type",), f"{head} is not one of available_node_types: {', '.join(types)}"


def up(path: str) -> None:
    """Start the cluster, or update it to its file. Creates the token if there is none."""
    values = load_cluster(path)
    if values.get("kind") == "RayJob":
        _kubectl("apply", "-f", path)
        return
    make_token(Path(TOKEN))
    mounts = values.get("file_mounts") or {}
    if absent := [str(local) for local in mounts.values() if not Path(str(local)).expanduser().exists()]:
        raise ClusterError(
            f"file_mounts names files that do not exist: {', '.join(absent)}",
            where=path,
            fix="run this from the root of a checkout of raydist, or correct the paths",
        )
    _ray("up", "-y", path)


def down(path: str) -> None:
    """Stop the cluster; the files on the storage stay."""
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
    """Run the command; its output is not captured. Raises ClusterError unless it succeeds."""
    if code := subprocess.run(command, check=False).returncode:
        raise ClusterError(f"{name} ended with status {code}", why="see its output above")
