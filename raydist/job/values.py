"""A job as plain values, nested mappings and lists as YAML gives them, and key paths into them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]


def plain(value: Any) -> Any:
    """`value` with each section of a job written in Python as a mapping of the keys that were given."""
    if isinstance(value, BaseModel):
        return {key: plain(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys, and create the sections that are missing."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            short = key == "optimizer" and isinstance(values.get(key), str)  # optimizer: muon
            values[key] = {"name": values[key]} if short else {}
        values = values[key]
    values[keys[-1]] = value


def with_parameters(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a single run: `parameters` replace the values at their dotted keys; no `tune`."""
    changed = copy.deepcopy({**values, "tune": None})
    for dotted, value in parameters.items():
        put(changed, dotted.split("."), value)
    return changed


def is_written(values: Any, path: KeyPath) -> bool:
    for key in path:
        listed = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if not (listed or (isinstance(values, Mapping) and key in values)):
            return False
        values = values[key]
    return True


def value_at(values: Any, path: KeyPath) -> Any:
    """The value at a path through mappings, lists and sections; None if the path leads through null."""
    for key in path:
        if values is None:
            return None
        values = getattr(values, str(key)) if isinstance(values, BaseModel) else values[key]
    return values
