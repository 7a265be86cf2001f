"""The data sets that a config names, as sources of a job."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raydist.autotrain.data import HUB_NAME, find_data
from raydist.corpus.formats import is_known
from raydist.corpus.locations import is_uri
from raydist.errors import JobError
from raydist.imports.draft import Draft

BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Formats as the datasets library names its readers of files; in a job they have the same names."""


def places(
    draft: Draft, name: str, path: str, files: Iterable[str], config: str = "", split: str = "train"
) -> list[str]:
    """Where the text is: local paths, URIs, or the parquet files of a hub data set.

    files: in the folder or the data set `path`, or, if that is the name of a builder, anywhere.
    What cannot be found is kept as it is, with a comment. name: the config's key.
    """
    files, is_folder = list(files), Path(path).expanduser().is_dir()
    in_folder = is_folder and not files and split != "train"  # which a source reads by itself
    is_place = is_uri(path) or Path(path).expanduser().exists() or is_known(path)
    if path in BUILDERS and not Path(path).exists():
        found = files or [path]
    elif not in_folder and (is_place or not HUB_NAME.fullmatch(path)):
        found = [str(Path(path) / file) if not is_uri(path) else f"{path}/{file}" for file in files] or [path]
    elif files:
        return [f"hf://datasets/{path}/{file}" for file in files]
    else:
        try:
            return find_data(f"{path}:{config}" if config and not is_folder else path, split, None)[0]
        except JobError as error:
            draft.note(name, path, f"copied without a check: {error.what}; {error.why}")
            return [path]
    missing = [place for place in found if not (is_uri(place) or "*" in place or _exists(place))]
    if missing:
        draft.note(name, missing, "there is no such file or folder here; the path is copied as it is")
    return found


def _exists(place: str) -> bool:
    return Path(place).expanduser().exists()


def source(found: list[str], text_column: str, kind: Any = None) -> dict[str, Any]:
    """kind: the builder that is asked for; a job needs it only for names that do not tell the format."""
    made: dict[str, Any] = {"path": found[0] if len(found) == 1 else found}
    if text_column != "text":
        made["text_column"] = text_column
    if kind in BUILDERS and not all(is_known(place) or Path(place).is_dir() for place in found):
        made["format"] = kind
    return made


def add_source(sources: dict[str, Any], path: str, made: dict[str, Any]) -> None:
    """Under the last part of `path`, with a number if that is taken. Dots would separate keys in --set."""
    stem = Path(path.rstrip("/")).name.split(".")[0]
    base = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "text"
    names = [base, *(f"{base}-{n}" for n in range(2, len(sources) + 3))]
    sources[next(name for name in names if name not in sources)] = made


def listed(value: Any) -> list[Any]:
    """A list, or what is given in place of a list of one; null: none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
