"""Errors cross process borders whole, and each has an exit code that is not 0."""

from __future__ import annotations

import inspect
import pickle

import pytest

from raydist import errors

KINDS = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.RaydistError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: type[errors.RaydistError]) -> None:
    error = kind("42 of 7 rows", where="a.csv:3", why="it cannot be", fix="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert str(again) == "42 of 7 rows\n  where: a.csv:3\n  why: it cannot be\n  do: mend it"
    assert kind.exit_code != 0


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    for kind in KINDS:
        line = next(line for line in drawn.splitlines() if f" {kind.__name__} " in f" {line.strip('│├└─ ')} ")
        assert f" {kind.exit_code}" in line
