"""A job as plain values: nested mappings and lists, as YAML gives them, and paths into them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]


def plain(value: Any) -> Any:
    """Sections, of a job written in Python, become mappings of the keys that were given."""
    if isinstance(value, BaseModel):
        return {key: plain(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys; sections are made on the way."""
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def with_parameters(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of one run: those at dotted keys replaced, and no sweep."""
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
    """The value at a path, of mappings, lists and sections; below null, null."""
    for key in path:
        if values is None:
            return None
        values = getattr(values, str(key)) if isinstance(values, BaseModel) else values[key]
    return values
