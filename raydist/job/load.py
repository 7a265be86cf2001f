"""Read a job from YAML and apply `--set` overrides; messages can name the place of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raydist.errors import JobError
from raydist.job.check import Places
from raydist.job.schema import Job
from raydist.job.values import KeyPath, put


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans of YAML 1.2: 5e-5 is a number, `no` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
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


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the YAML file `path`, with overrides such as `train.lr=1e-4`.

    Raises JobError with every problem of the file and the overrides, each with its place.
    """
    values, places = read_yaml(path)
    return build_job(_apply_overrides(values, overrides, places), places, str(path))


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The mapping in the file, and file:line of every key. Raises JobError."""
    text, where = _read(Path(path)), str(path)
    try:
        lines = dict(key_lines(yaml.compose(text, Loader=_Loader), ()))
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except yaml.YAMLError as error:
        raise JobError("not valid YAML", where=where, why=str(error)) from error
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
        put(values, keys, yaml.load(value, Loader=_Loader))  # noqa: S506 - a subclass of the safe loader
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
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"no job file {path}", fix=f"raydist init {path} writes a commented one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read the job file {path}", why=str(error)) from error


def key_lines(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """(key path, line) of every key. Refuses a key that is given twice: YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise JobError(f"the key {key.value} is given twice", where=f"line {key.start_mark.line + 1}")
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from key_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from key_lines(item, (*path, index))
