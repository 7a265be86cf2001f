"""Read a job from YAML, apply `--set` overrides, and tell all that is wrong with it at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.job.search import put, refusal, with_parameters

KeyPath = tuple[str | int, ...]


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
    """Validate plain values; `places` says where each key path was written."""
    problems: list[str] = []
    try:
        job = Job.model_validate(values)
        problems = list(_search_problems(job, values, places or {}, where))
    except ValidationError as error:
        problems = list(_problems(error, values, places or {}, where))
    if not problems:
        return job
    raise JobError(
        f"{len(problems)} problem{'s' * (len(problems) > 1)} in the job\n"
        + "\n".join(f"  {p}" for p in problems),
        fix="mend these lines; raydist validate FILE checks without starting anything",
    )


def _search_problems(
    job: Job, values: Mapping[str, Any], places: Mapping[KeyPath, str], where: str
) -> Iterator[str]:
    """A job with an extreme value of each searched key must be a job."""
    for key, distribution in job.tune.search.items() if job.tune else ():
        place = places.get(("tune", "search", key), where)
        if reason := refusal(key, job):
            yield f"{place}: {key}: {reason}"
            continue
        for value in distribution.extremes:
            tried = with_parameters(values, {key: value})
            try:
                Job.model_validate(tried)
            except ValidationError as error:
                at: dict[KeyPath, str] = {tuple(key.split(".")): place}
                yield from (
                    f"{problem} (searched: {value!r})" for problem in _problems(error, tried, at, place)
                )


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], places: dict[KeyPath, str]
) -> dict[str, Any]:
    """`a.b=c` sets key b of section a to the YAML value c; sections are made on the way."""
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise JobError(f"--set {text} is not KEY=VALUE", fix="for example --set train.lr=1e-4")
        put(values, keys, yaml.load(value, Loader=_Loader))  # noqa: S506 - a subclass of the safe loader
        places[tuple(keys)] = f"--set {dotted}"
    return values


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
    """(key path, line) of every key; refuses a key given twice, of which YAML would keep the last."""
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


def _problems(
    error: ValidationError, values: Mapping[str, Any], places: Mapping[KeyPath, str], where: str
) -> Iterator[str]:
    """One line per place: pydantic tells a wrong union once for each of its members."""
    told: set[KeyPath] = set()
    for detail in error.errors():
        path = _written_path(detail["loc"], values)
        if path in told:
            continue
        told.add(path)
        dotted = ".".join(map(str, path)) or "job"
        starts = (path[:length] for length in range(len(path), 0, -1))
        place = next((places[start] for start in starts if start in places), where)
        yield f"{place}: {dotted}: {_message(detail, path)}"


def _written_path(loc: tuple[str | int, ...], values: Any) -> KeyPath:
    """Drop the names of union members, which pydantic puts among the keys."""
    path: list[str | int] = []
    for index, key in enumerate(loc):
        listed = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if listed or (isinstance(values, Mapping) and key in values):
            values = values[key]
        elif not (isinstance(values, Mapping) and index == len(loc) - 1):
            continue
        path.append(key)
    return tuple(path)


def _message(detail: Any, path: KeyPath) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key{_nearest(path)}"
    text = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("missing", "value_error"):
        return text
    return f"{text}, not {detail['input']!r}"


def _nearest(path: KeyPath) -> str:
    *parents, name = map(str, path)
    section = ".".join("*" if i and parents[i - 1] == "sources" else key for i, key in enumerate(parents))
    known = list(dict.fromkeys(_known_keys(Job)))
    here = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(name, here, 1):
        return f"; did you mean {close[0]}?"
    if elsewhere := [key for key in known if key.rpartition(".")[2] == name]:
        return f"; it belongs at {' or '.join(elsewhere)}"
    return f"; known here: {', '.join(here)}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted, with * for the free names below sources."""
    for name, field in section.model_fields.items():
        yield prefix + name
        below = f"{prefix}{name}.*." if name == "sources" else f"{prefix}{name}."
        for inner in _sections(field.annotation):
            yield from _known_keys(inner, below)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
