"""Turn an AutoTrain config file into a job file; a comment explains each key that cannot be mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydist.autotrain.data import find_data
from raydist.autotrain.params import LLMTrainingParams, fit_block_size, in_a_line, mapped, plain, refusals
from raydist.autotrain.table import ALIASES, TABLE
from raydist.errors import JobError, RaydistError
from raydist.imports.draft import file_text, written
from raydist.job.identity import dotted_items

TASKS = ("llm", "llm-default", "llm-generic")
NAMES = {"base_model": "model", "data.path": "data_path"} | ALIASES
"""Keys whose parameter has another name than the last part of the key."""

NEEDED = {"base_model": "model", "data.path": "data_path", "project_name": "project_name"}


def job_text(nested: dict[str, Any], path: Path) -> str:
    """The job file for the config in `path`. Raises JobError for another task, or without model or data."""
    config = dict(dotted_items(nested))
    _check(config, path)
    keys: dict[str, str] = {}
    comments: dict[str, str] = {}
    for key in [key for key in config if key != "task"]:
        last = key.rpartition(".")[2]
        name = NAMES.get(key) or NAMES.get(last, last)
        if name in keys:
            comments[written(key, config[key])] = f"{keys[name]} sets it already"
        keys.setdefault(name, key)
    given = {name: plain(name, config[key]) for name, key in keys.items()}
    while wrong := refusals(given):
        comments |= {written(keys[name], given.pop(name)): why for name, why in wrong.items()}
    for name in [n for n in given if not TABLE[n].key and TABLE[n].values is None]:
        if (value := given.pop(name)) not in (False, None):
            why = f"a job has no such key, but raydist llm has the option: {TABLE[name].meaning}"
            comments[written(keys[name], value)] = why
    values = _values(LLMTrainingParams(**given), comments)
    return file_text("AutoTrain", path, values, comments)


def _check(config: dict[str, Any], path: Path) -> None:
    task, trainer = config.get("task"), str(config.get("params.trainer", "default"))
    if task not in TASKS or trainer not in TABLE["trainer"].values:  # type: ignore[operator]
        raise JobError(
            f"a config for task {task}" + (f", trainer {trainer}" if task in TASKS else ""), where=str(path),
            why=f"that trainer {TABLE['trainer'].refused}", fix=f"a config with task: {' or '.join(TASKS)}",
        )  # fmt: skip
    if missing := [key for key in NEEDED if not config.get(key)]:
        raise JobError(f"the config has no {', no '.join(missing)}", where=str(path))


def _values(p: LLMTrainingParams, comments: dict[str, str]) -> dict[str, Any]:
    """The job's values. Data or a model that cannot be found keeps the file's value, with a comment."""

    def find(places: str | list[str], train: str, valid: str | None) -> tuple[list[str], list[str]]:
        try:
            return find_data(places, train, valid)
        except JobError as error:
            comments["data"] = f"copied without a check: {in_a_line(error)}"
            return [places] if isinstance(places, str) else places, [valid] if valid else []

    values = mapped(p, find)
    try:
        fit_block_size(p, values)
    except RaydistError as error:
        comments["job"] = f"it may need to be changed: {' '.join(str(error).split())}"
    return values
