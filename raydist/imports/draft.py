"""A job in the making: what another trainer's config sets in it, and a comment for everything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raydist.job.check import find_problems, known_keys
from raydist.job.foreign import foreign
from raydist.job.schema import Fields
from raydist.job.values import KeyPath, put
from raydist.redact import redact, redacted

WORDS = ("model.base", "model.tokenizer")
SECRET = re.compile(r"((?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token|password|secret|api_?key)$", re.IGNORECASE)


@dataclass
class Draft:
    """left: the config's keys that are not dealt with yet; null counts as not given.

    defaults: what the trainer takes where its file is silent, as far as it decides the trained weights.
    values: of the job so far.  comments: `key: value` of the config -> why it is not in the job as it is.
    """

    left: dict[str, Any]
    defaults: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    _origins: dict[KeyPath, tuple[str, Any]] = field(default_factory=dict)

    def given(self, name: str) -> bool:
        return self.left.get(name) is not None

    def take(self, name: str) -> Any:
        """The value of a key, or its default; the key is then dealt with."""
        value = self.left.pop(name, None)
        return self.defaults.get(name) if value is None else value

    def take_number(self, name: str) -> float | int | None:
        """The same for a number, also one in quotes. Anything else is commented, and the default taken."""
        value = number(self.take(name))
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        self.note(name, value, "it is not a number")
        return self.defaults.get(name)

    def set(self, key: str, value: Any, name: str, given: Any = None) -> None:
        """Set a job's key. name, given: the config's key that says so, and its value if it is another."""
        path = tuple(key.split("."))
        put(self.values, path, value)
        self._origins[path] = (name, value if given is None else given)

    def note(self, name: str, value: Any, why: str) -> None:
        self.comments[written(name, value)] = why

    def take_over(self, *names: str) -> None:
        """Numbers and words that mean the same in a job, under the name that `job_key` gives."""
        for name in names:
            is_word = job_key(name) in WORDS
            if (value := self.take(name) if is_word else self.take_number(name)) is not None:
                self.set(job_key(name), value, name)

    def finish(self) -> None:
        """Comment what is left, and what a job does not allow; the latter is taken out of the values."""
        for name, value in self.left.items():
            meant = foreign(name)
            if value is not None and (meant or value is not False):  # false: some feature is not used
                self.note(name, value, str(meant) if meant else "a job has no such key")
        self.left = {}
        problems = find_problems(Fields, self.values)
        while named := next(((path, p) for p in problems if (path := self._set_at(p.at))), None):
            path, problem = named
            self.note(*self._origins.pop(path), f"a job cannot have that: {problem.message}")
            _remove(self.values, path)
            problems = find_problems(Fields, self.values)
        for problem in problems:
            self.comments[problem.key] = f"to be corrected: {problem.message}"
        self.values = {
            key: self.values[key] for key in Fields.model_fields if self.values.get(key) not in (None, {})
        }

    def _set_at(self, at: KeyPath) -> KeyPath | None:
        """The first path that was set and holds the place `at`, or lies within it."""
        return next((path for path in self._origins if at and _overlap(path, at)), None)


def number(value: Any) -> Any:
    """A finite number in quotes as a number, one that is not finite as a word, all else as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _overlap(path: KeyPath, at: KeyPath) -> bool:
    within_a_section = len(at) > 1 and path[: len(at)] == at
    return within_a_section or at[: len(path)] == path


def job_key(name: str) -> str:
    """What a key of another trainer is called in a job, dotted: by the table, or by its own last part."""
    meant = foreign(name)
    return meant.keys[0] if meant else next(k for k in known_keys(Fields) if k.rpartition(".")[2] == name)


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    for key in path[:-1]:
        values = values.get(str(key), {})
    values.pop(str(path[-1]), None)


def written(key: str, value: Any) -> str:
    """`key: value` in a line. The name of a variable is copied; a value that may be a secret is not."""
    shown = _shown(key, value)
    hidden = shown == _HIDDEN
    return f"{key}: " + (_HIDDEN if hidden else json.dumps(shown, ensure_ascii=False, default=str))


_HIDDEN = "(not copied)"


def _shown(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shown(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(key, inner) for inner in value]
    if not isinstance(value, str) or re.fullmatch(r"\$\{\w+\}", value):
        return value
    return _HIDDEN if SECRET.search(key) or value.startswith("hf_") else redact(value)


def file_text(trainer: str, path: Path, values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The job file. trainer: whose config `path` is. A secret in a value becomes ***."""
    kept = redacted(values)
    if kept != values:
        comments = {**comments, "***": "a secret was here; it is copied nowhere"}
    lines = (" ".join(f"# {key}  - {why}".split()) for key, why in comments.items())
    head = f"# From {trainer}'s config {path.name!r}." + (
        " These keys were not taken over as they are:" if comments else ""
    )
    dumped = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([head, *lines]) + "\n" + dumped
