"""The user's own functions, which a job names as module:function, and where their modules are found.

A module is looked for as Python does, and then in the working folder: last, and only under the names that
the job gives. Whatever else lies in that folder is never imported. The driver sends its workers the folders
of the modules that it found, since theirs is another working folder.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raydist.errors import JobError

if TYPE_CHECKING:
    from raydist.job.schema import Fields

WORKING_FOLDER = ""
"""Stands for the one that the process has when the module is imported."""


class _NamedModules(MetaPathFinder):
    """Asked after all other finders. folders: {top-level module: the folder that it is in}."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}

    def add(self, folders: Mapping[str, str]) -> None:
        self.folders |= folders
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or name not in self.folders:
            return None
        return PathFinder.find_spec(name, [self.folders[name] or str(Path.cwd())])


_NAMED = _NamedModules()


def import_function(path: str, where: str) -> Any:
    """The function. where: the key of the job that names it. Raises JobError if it cannot be imported."""
    module_name, _, name = path.partition(":")
    _NAMED.add({_top(path): _NAMED.folders.get(_top(path), WORKING_FOLDER)})
    try:
        return attrgetter(name)(importlib.import_module(module_name))
    except (ImportError, AttributeError, ValueError) as error:
        raise JobError(
            f"cannot import {path}",
            where=where,
            why=str(error),
            fix="write module:function, of a module in the working folder or on PYTHONPATH; what it imports"
            " in turn has to be installed, in its own package, or on PYTHONPATH",
        ) from error


def named_functions(job: Fields) -> Iterator[tuple[str, str]]:
    """(key of the job, module:function) of each function that the job names."""
    for index, step in enumerate(job.corpus.clean):
        if isinstance(step, str) and ":" in step:
            yield f"corpus.clean[{index}]", step
    if job.train.collator is not None:
        yield "train.collator", job.train.collator
    for index, hook in enumerate(job.train.hooks):
        yield f"train.hooks[{index}]", hook


def module_folders(functions: Iterable[str]) -> dict[str, str]:
    """{top-level module: its folder} of the functions whose modules this process finds; for `find_in`."""
    folders = {}
    for name in {_top(function) for function in functions}:
        _NAMED.add({name: _NAMED.folders.get(name, WORKING_FOLDER)})
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue  # importing it will tell
        inside = next(iter(spec.submodule_search_locations or ()), None) if spec else None
        place = inside or (spec.origin if spec and spec.has_location else None)
        if place is not None:
            folders[name] = str(Path(place).absolute().parent)
    return folders


def find_in(folders: Mapping[str, str]) -> None:
    """From now on this process finds these modules in these folders, unless its own path has them."""
    _NAMED.add(folders)


def _top(function: str) -> str:
    """The top-level module of module:function."""
    return function.partition(":")[0].partition(".")[0]


def source_of(function: Any) -> list[str]:
    """Source of the function, and of its whole module, since it may call its neighbours.

    Raises TypeError or OSError if there is no source.
    """
    return [inspect.getsource(function), inspect.getsource(inspect.getmodule(function) or function)]
