"""YAML and JSON as plain values, with limits that hold before anything is built of them.

A few hundred bytes of aliases stand for gigabytes, and a few thousand brackets for more levels than Python's
own stack has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raydist.errors import JobError
from raydist.job.values import KeyPath
from raydist.limits import read_limited

MOST_LEVELS = 40
MOST_NODES = 100_000
"""Keys and values, each counted as often as aliases repeat it."""

Loader = type[yaml.SafeLoader]

_BUILDING = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises, besides its own errors, for a scalar that is not what its tag or its form says."""


def read_yaml_text(path: Path) -> str:
    """Raises JobError for a file that cannot be read, or is too large for what a person writes."""
    try:
        return read_limited(path)
    except FileNotFoundError:
        raise JobError(f"no job file {path}", fix=f"raydist init {path} writes a commented one") from None
    except (OSError, ValueError) as error:
        raise JobError(f"cannot read the job file {path}", why=str(error)) from error


def parse_yaml(text: str, loader: Loader, where: str = "") -> tuple[Any, dict[KeyPath, int]]:
    """The plain value, and the line of every key in it. Raises JobError. loader: a safe one."""
    try:
        _check_size(text, loader)
        lines = dict(_key_lines(yaml.compose(text, Loader=loader), ()))
        value = yaml.load(text, Loader=loader)  # noqa: S506 - safe, as the caller says
    except (yaml.YAMLError, *_BUILDING) as error:
        raise JobError("not valid YAML", where=where, why=str(error) or type(error).__name__) from error
    _check_plain(value, where)
    return value, lines


def parse_json(text: str) -> Any:
    """The value. Raises ValueError, also for one of too many levels."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it has more than {MOST_LEVELS} levels") from None
    level, levels = [value], 0
    while level := [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]:
        levels += 1
        if levels > MOST_LEVELS:
            raise ValueError(f"it has more than {MOST_LEVELS} levels")
    return value


def _inside(value: dict[Any, Any] | list[Any]) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _check_size(text: str, loader: Loader) -> None:
    """Raises ValueError for a text that is too large or too deep. PyYAML's events do not expand aliases."""
    sizes: dict[str, int] = {}
    open_nodes: list[list[Any]] = [["", 0]]
    line = 0
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else line
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) - 1 > MOST_LEVELS:
                raise ValueError(f"line {line}: more than {MOST_LEVELS} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise ValueError(f"line {line}: *{event.anchor} contains itself")
            anchor, size = None, sizes.get(str(event.anchor), 1)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        open_nodes[-1][1] += size
        if open_nodes[-1][1] > MOST_NODES:
            raise ValueError(
                f"line {line}: more than {MOST_NODES:,} keys and values,"
                " counted as often as aliases repeat them"
            )


def _key_lines(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """(key path, line) of every key. Refuses a key that is given twice: YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise JobError("a key is a word, not a list or a mapping", where=f"line {line}")
            if key.value in seen:
                raise JobError(f"the key {key.value} is given twice", where=f"line {line}")
            seen.add(key.value)
            yield (*path, key.value), line
            yield from _key_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _key_lines(item, (*path, index))


def _check_plain(value: Any, where: str, at: str = "") -> None:
    """Dates, sets and bytes, for which YAML has forms of their own, mean nothing in a job."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, where, at)
            _check_plain(inner, where, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_plain(inner, where, f"{at}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise JobError(
            f"{at or 'the value'} is a {type(value).__name__}; a job has text, numbers, lists and mappings",
            where=where,
            fix="put it in quotes to make it text",
        )
