"""Find the files of a split: local files and folders, URIs, and data sets of the hub as parquet."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydist.corpus.files import folder_splits, list_files
from raydist.corpus.formats import is_known
from raydist.corpus.locations import is_uri
from raydist.corpus.splits import ALL, TRAIN
from raydist.errors import CorpusError, JobError, first_line
from raydist.job.schema import Source

FindData = Callable[[str | list[str], str, str | None], tuple[list[str], list[str]]]
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")
CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps each data set's splits as parquet: CONFIG/SPLIT/*.parquet."""


def find_data(places: str | list[str], train: str, valid: str | None) -> tuple[list[str], list[str]]:
    """Paths of the training and the validation split; none of the latter if `valid` is None.

    A folder's splits are those that its files declare (see raydist.corpus.splits), or else its entries of
    their names, or else files deeper in it. If nothing in a folder is named `train`, everything in it but the
    validation split is training text.
    """
    places = [places] if isinstance(places, str) else places
    by_place = {place: _split(place, valid) if valid else [] for place in places}
    training = [path for place in places for path in _training(place, train, by_place[place])]
    validation = [path for paths in by_place.values() for path in paths]
    if valid and not validation:
        if not (is_uri(valid) or glob.has_magic(valid) or Path(valid).expanduser().exists()):
            raise _no_split(valid, places, "valid_split")
        validation = [valid]
    return training, validation


def _training(place: str, split: str, validation: list[str]) -> list[str]:
    """Paths of the training split in `place`, without those in `validation`. Raises JobError."""
    if named := _split(place, split):
        return named
    folder = Path(place).expanduser()
    if split != "train" or _is_hub(place):
        raise _no_split(split, [place], "train_split")
    if not (is_uri(place) or glob.has_magic(place) or folder.exists()):
        raise JobError(
            f"no file or folder {place}",
            where="data_path",
            fix="give a file, a folder, or a hub data set: owner/name",
        )
    if not validation:
        return [place]
    entries = _entries(folder)
    if not set(validation) <= set(entries):
        entries = [str(folder / file.name) for file in list_files(Source(path=str(folder), split=ALL))]
    return [path for path in entries if path not in validation]


def _split(place: str, split: str) -> list[str]:
    """Files and subfolders of the split; [] if `place` is no folder or has none."""
    if _is_hub(place):
        return _hub_split(place, split)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return []
    try:
        splits = folder_splits(folder)
    except CorpusError as error:
        raise JobError(error.what, where="data_path", why=error.why, fix=error.fix) from error
    found = splits.find(split)
    if splits.is_declared and found == TRAIN:
        return [place]  # a source reads this split if none is named
    named = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9])")
    entries = [path for path in _entries(folder) if named.match(Path(path).name)]
    if entries and not splits.is_declared:
        return entries
    return sorted(str(folder / name) for name, of in splits.of.items() if found in of)


def _entries(folder: Path) -> list[str]:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [str(p) for p in entries if p.is_dir() or is_known(p.name) if p.name[0] not in "._"]


def _is_hub(place: str) -> bool:
    named = HUB_NAME.fullmatch(place) is not None and not is_known(place)
    return named and not Path(place).exists()


def _hub_split(place: str, split: str) -> list[str]:
    """[] if the data set has no such split. Raises JobError if it cannot be reached or read completely."""
    matched = HUB_NAME.fullmatch(place)
    assert matched is not None  # _is_hub
    name, config = matched.groups()
    root = f"datasets/{name}@{CONVERTED}"
    configs = _folders(root, place)
    if config is None and len(configs) == 1:
        config = configs[0]
    if config not in configs:
        raise JobError(
            f"the data set {name} has {len(configs)} configs", where="data_path",
            fix="name one of them: " + ", ".join(f"{name}:{c}" for c in configs),
        )  # fmt: skip
    splits = _folders(f"{root}/{config}", place)
    if f"partial-{split}" in splits:
        raise JobError(
            f"the hub has only the first part of {name}'s {split} as parquet", where="data_path",
            why="training would leave the rest out", fix="download the data set, and give its folder",
        )  # fmt: skip
    return [f"hf://{root}/{config}/{split}/*.parquet"] if split in splits else []


def _folders(path: str, place: str) -> list[str]:
    """Names of the folders in `path` on the hub."""
    from huggingface_hub import HfFileSystem

    try:
        entries: list[Any] = HfFileSystem().ls(path)
    except Exception as error:  # errors of the hub or of its HTTP client, or OSError
        raise JobError(
            f"{place} is no local file or folder, and no parquet data set of the hub", where="data_path",
            why=first_line(error),
            fix="correct the path; or download the data set, and give its folder",
        ) from error  # fmt: skip
    return sorted(e["name"].rpartition("/")[2] for e in entries if e["type"] == "directory")


def _no_split(split: str, places: list[str], parameter: str) -> JobError:
    return JobError(
        f"nothing is named {split} in {', '.join(places)}", where=parameter,
        fix="give a file or subfolder of that name, or, as valid_split, a path",
    )  # fmt: skip
