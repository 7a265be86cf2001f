"""Every problem of a job's values in one report: first each field by itself, then the rules between keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from raydist.errors import JobError
from raydist.job.foreign import foreign
from raydist.job.rules import ALL, EACH, RULES, Rule
from raydist.job.values import KeyPath, is_written, plain, value_at, with_parameters

Schema = type[BaseModel]


class Problem(NamedTuple):
    """at: the key path under which it is written.  key: the key that is wrong, dotted."""

    at: KeyPath
    key: str
    message: str


@dataclass(frozen=True)
class Places:
    """lines: file:line of each key path.  whole: the place of the job itself."""

    lines: Mapping[KeyPath, str] = field(default_factory=dict)
    whole: str = "job"

    def find(self, path: KeyPath) -> str:
        """The place of the key, or of the innermost section around it that has one."""
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self.lines[key] for key in around if key in self.lines), self.whole)


def require_valid(schema: Schema, given: Any, places: Places) -> None:
    """Raises JobError with every problem of a job's values, each with its place, in the file's order."""
    problems = find_problems(schema, plain(given))
    if not problems:
        return
    order = {place: n for n, place in enumerate(places.lines.values())}
    problems.sort(key=lambda problem: order.get(places.find(problem.at), -1))
    lines = [f"  {places.find(problem.at)}: {problem.key}: {problem.message}" for problem in problems]
    raise JobError(
        "\n".join([f"{len(problems)} problem{'s' * (len(problems) > 1)} in the job", *lines]),
        fix="fix these lines; raydist validate FILE checks without starting anything",
    )


def find_problems(schema: Schema, values: Any) -> list[Problem]:
    """The problems of plain values. `schema` has the fields of a job. Rules run only on valid keys."""
    try:
        job, wrong, problems = schema.model_validate(values), set[KeyPath](), list[Problem]()
    except ValidationError as error:
        problems, wrong = _wrong_fields(schema, error, values)
        job = _valid_part(schema, values, wrong)
    for keys, rule in RULES:
        problems += _problems_of_rule(keys, rule, job, values, wrong)
    return [*problems, *_wrong_search(schema, job, values, problems)]


# --- fields


def _wrong_fields(schema: Schema, error: ValidationError, values: Any) -> tuple[list[Problem], set[KeyPath]]:
    """The problems, and the paths whose values cannot be used: the wrong keys, and the keys that an unknown
    key probably stands for.

    Each path has one problem: pydantic reports a wrong union once for each of its members.
    """
    problems: dict[KeyPath, Problem] = {}
    meant: set[KeyPath] = set()
    for detail in error.errors():
        path = _written_path(detail["loc"], values)
        if path in problems:
            continue
        message = str(detail["msg"]).removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            hint, keys = _hint(schema, path)
            message = f"unknown key; {hint}"
            meant |= {tuple(key.split(".")) for key in keys}
        elif detail["type"] == "model_type":
            message = f"a section takes keys and their values, not {detail['input']!r}"
        elif detail["type"] not in ("missing", "value_error"):
            message = f"{message}, not {detail['input']!r}"
        problems[path] = Problem(path, ".".join(map(str, path)) or "job", message)
    return list(problems.values()), problems.keys() | meant


def _written_path(loc: tuple[str | int, ...], values: Any) -> KeyPath:
    """The path as the user wrote it: pydantic puts the names of union members among the keys."""
    path: list[str | int] = []
    for index, key in enumerate(loc):
        listed = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if listed or (isinstance(values, Mapping) and key in values):
            values = values[key]
        elif not (isinstance(values, Mapping) and index == len(loc) - 1):
            continue
        path.append(key)
    return tuple(path)


def _valid_part(section: Schema, values: Any, wrong: set[KeyPath], at: KeyPath = ()) -> BaseModel:
    """The section with its valid fields and the defaults; wrong fields are left out."""
    valid = {}
    for name, info in section.model_fields.items():
        path = (*at, name)
        if not isinstance(values, Mapping) or name not in values or path in wrong:
            continue
        if any(other[: len(path)] == path for other in wrong):
            valid[name] = _valid_inside(info.annotation, values[name], wrong, path)
        else:
            kind: Any = Annotated[info.annotation, info]
            valid[name] = TypeAdapter(kind).validate_python(values[name])
    return section.model_construct(**valid)


def _valid_inside(annotation: Any, value: Any, wrong: set[KeyPath], path: KeyPath) -> Any:
    """The valid part of a value that holds sections: one or null, or many in a mapping or a list."""
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        annotation = next(iter(_sections(annotation)), None)
    if origin is dict and isinstance(value, Mapping):
        items = {key: inner for key, inner in value.items() if (*path, key) not in wrong}
        return {key: _valid_inside(kinds[1], inner, wrong, (*path, key)) for key, inner in items.items()}
    if origin is list and isinstance(value, list):
        return [_valid_inside(kinds[0], inner, wrong, (*path, n)) for n, inner in enumerate(value)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _valid_part(annotation, value, wrong, path)
    return None


# --- rules


def _problems_of_rule(
    keys: Sequence[str], rule: Rule, job: BaseModel, values: Any, wrong: set[KeyPath]
) -> Iterator[Problem]:
    """Call the rule once, or once for each name that EACH stands for; at most one problem a call."""
    patterns = [tuple(key.split(".")) for key in keys]
    for name, paths in _named(patterns, job, wrong):
        if any(_overlap(path, other) for path in paths for other in wrong):
            continue
        arguments = [_value(job, path) for path in paths]
        if message := rule(*([] if name is None else [name]), *arguments):
            at = _first_written(paths, values)
            yield Problem(at, ".".join(map(str, at)) or "job", message)


def _named(
    patterns: list[tuple[str, ...]], job: BaseModel, wrong: set[KeyPath]
) -> Iterator[tuple[str | int | None, list[KeyPath]]]:
    """(name, key paths) for each name that EACH stands for; (None, key paths) for keys without EACH."""
    above = next((pattern[: pattern.index(EACH)] for pattern in patterns if EACH in pattern), None)
    if above is None:
        yield None, list(patterns)
    elif not any(above[: len(other)] == other for other in wrong):
        named = value_at(job, above) or {}
        for name in range(len(named)) if isinstance(named, list) else list(named):
            yield name, [tuple(name if key == EACH else key for key in pattern) for pattern in patterns]


def _overlap(path: KeyPath, other: KeyPath) -> bool:
    """Whether both are the same path or one is inside the other."""
    return all(a in (ALL, b) for a, b in zip(path, other, strict=False))


def _value(job: BaseModel, path: KeyPath) -> Any:
    if ALL not in path:
        return value_at(job, path)
    above, below = path[: path.index(ALL)], path[path.index(ALL) + 1 :]
    named = value_at(job, above)
    if named is None:
        return None
    items = enumerate(named) if isinstance(named, list) else named.items()
    return {name: value_at(inner, below) for name, inner in items}


def _first_written(paths: list[KeyPath], values: Any) -> KeyPath:
    """The first path whose value is not null, else the first that is written, else the innermost section
    around the first path that is written."""
    known = [path[: path.index(ALL)] if ALL in path else path for path in paths]
    written = [path for path in known if is_written(values, path)]
    if written:
        return next((path for path in written if value_at(values, path) is not None), written[0])
    around = (known[0][:length] for length in range(len(known[0]) - 1, 0, -1))
    return next((path for path in around if is_written(values, path)), ())


# --- a sweep


def _wrong_search(schema: Schema, job: BaseModel, values: Any, known: Sequence[Problem]) -> Iterator[Problem]:
    """Problems of the job with an extreme value of a searched key, unless the job itself has them too."""
    tune = getattr(job, "tune", None)
    of_job = {problem[1:] for problem in known}
    for key, distribution in (getattr(tune, "search", None) or {}).items():
        at: KeyPath = ("tune", "search", key)
        if any(problem.at[:3] == at for problem in known):
            continue
        for value in distribution.extremes:
            for problem in find_problems(schema, with_parameters(values, {key: value})):
                if problem[1:] not in of_job:
                    yield Problem(at, problem.key, f"{problem.message} (searched: {value!r})")


# --- unknown keys


def _hint(schema: Schema, path: KeyPath) -> tuple[str, Sequence[str]]:
    """What to write in place of an unknown key, and the dotted keys that it may stand for."""
    *parents, name = map(str, path)
    section = ".".join(ALL if i and parents[i - 1] == "sources" else key for i, key in enumerate(parents))
    known = known_keys(schema)
    if known_elsewhere := foreign(name):
        return str(known_elsewhere), known_elsewhere.keys
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(name, siblings, 1):
        return f"did you mean {close[0]}?", [".".join([*parents, close[0]])]
    if elsewhere := [key for key in known if key.rpartition(".")[2] == name]:
        return f"it belongs at {' or '.join(elsewhere)}", elsewhere
    return f"known here: {', '.join(siblings)}", ()


@cache
def known_keys(schema: Schema) -> tuple[str, ...]:
    """Every key of the schema, dotted, with * for the free names below sources."""
    return tuple(dict.fromkeys(_keys_of(schema, "")))


def _keys_of(section: Schema, prefix: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        below = f"{prefix}{name}.{ALL}." if name == "sources" else f"{prefix}{name}."
        for inner in _sections(info.annotation):
            yield from _keys_of(inner, below)


def _sections(annotation: Any) -> Iterator[Schema]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
