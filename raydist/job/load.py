"""Read a job from YAML and apply `--set` overrides; messages can name the place of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raydist.errors import JobError
from raydist.job.check import Places
from raydist.job.schema import Job
from raydist.job.text import parse_yaml, read_yaml_text
from raydist.job.values import KeyPath, put
from raydist.redact import redacted


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: 5e-5 is a number, 010 is ten, `no` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """010 is ten, and 0o10 is eight."""
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the YAML file `path`, with overrides such as `train.lr=1e-4`.

    Raises JobError with every problem of the file and the overrides, each with its place.
    """
    values, places = read_yaml(path)
    return build_job(_apply_overrides(values, overrides, places), places, str(path))


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The mapping in the file, and file:line of every key. Raises JobError."""
    where = str(path)
    values, lines = parse_yaml(read_yaml_text(Path(path)), _Loader, where)
    if not isinstance(values, dict):
        raise JobError(
            "a job is a mapping of keys to values", where=where, fix="raydist init writes an example"
        )
    return values, {key: f"{where}:{line}" for key, line in lines.items()}


def build_job(
    values: Mapping[str, Any], places: Mapping[KeyPath, str] | None = None, where: str = "job"
) -> Job:
    """The job with these plain values. places: file:line of each key path. Raises JobError."""
    return Job.model_validate(values, context=Places(places or {}, where))


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], places: dict[KeyPath, str]
) -> dict[str, Any]:
    """`a.b=c` sets key b of section a to the YAML value c, and creates the section if it is missing."""
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise JobError(f"--set {text} is not KEY=VALUE", fix="for example --set train.lr=1e-4")
        put(values, keys, parse_yaml(value, _Loader, f"--set {dotted}")[0])
        _replace_places(places, tuple(keys), f"--set {dotted}")
    return values


def _replace_places(places: dict[KeyPath, str], path: KeyPath, place: str) -> None:
    """An override replaces what the file has at `path`; sections that it creates get its place too."""
    for replaced in [key for key in places if key[: len(path)] == path]:
        del places[replaced]
    for length in range(1, len(path)):
        places.setdefault(path[:length], place)
    places[path] = place


def job_yaml(job: Job) -> str:
    """The resolved job, every default written out."""
    return _dump(job.model_dump(mode="json"))


def kept_yaml(job: Job) -> str:
    """The same with *** for every secret in it, for a file that stays."""
    return _dump(redacted(job.model_dump(mode="json")))


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
