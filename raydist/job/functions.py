"""The user's own functions, which a job names as module:function."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter
from typing import Any

from raydist.errors import JobError


def import_function(path: str, where: str) -> Any:
    """The function. where: the key of the job that names it. Raises JobError if it cannot be imported."""
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
    """Source of the function, and of its whole module, since it may call its neighbours.

    Raises TypeError or OSError if there is no source.
    """
    return [inspect.getsource(function), inspect.getsource(inspect.getmodule(function) or function)]
