"""Functions of the user's that a job names as module:function."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

from raydist.errors import JobError


def import_function(path: str, where: str) -> Any:
    """The function. where: the job's key. Raises JobError for one that cannot be imported."""
    module_name, _, name = path.partition(":")
    try:
        return attrgetter(name)(importlib.import_module(module_name))
    except (ImportError, AttributeError, ValueError) as error:
        raise JobError(
            f"cannot import {path}",
            where=where,
            why=str(error),
            fix="write module:function, of a module that Python can import (see PYTHONPATH)",
        ) from error


def source_of(function: Any) -> list[str]:
    """Its own, and its whole module's, since it may call its neighbours. TypeError, OSError: it has none."""
    return [inspect.getsource(function), inspect.getsource(inspect.getmodule(function) or function)]
