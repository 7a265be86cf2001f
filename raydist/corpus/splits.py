"""Which files of a folder are the split of a data set, and which are none of its data.

    names of a folder's files ─▶ find_splits ─▶ Splits ─▶ why each file that is not read is left out

The first of these that a folder has counts:

    dataset_dict.json               written by `save_to_disk` of the datasets library (state.json: one split)
    README.md                       a card of the hub: its `configs` names the files of each split
    data/train-00000-of-00001.*     the hub's own name for a part of a split
    train.jsonl, train/, a-test.csv a word for the split in a name, by the hub's rule

The first three declare the splits: a file that they give none is no data. Words in names do not: next to
train and another split, files without such a word are training text if they have a training file's format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from raydist.corpus.formats import format_named, names_no_format
from raydist.corpus.locations import glob_regex
from raydist.errors import CorpusError, JobError
from raydist.job.text import parse_json, parse_yaml

TRAIN, ALL = "train", "all"
OTHER_SPLIT, NO_SPLIT, COMPANION = "another split", "in no split", "companions of data"

CARD, STATE, SPLITS_FILE, INFO = "README.md", "state.json", "dataset_dict.json", "dataset_info.json"
CARD_KEYS = {
    "annotations_creators", "configs", "dataset_info", "language", "language_creators", "license",
    "multilinguality", "pretty_name", "size_categories", "source_datasets", "task_categories", "task_ids",
}  # fmt: skip
"""Keys by which the front matter of README.md is a card's."""
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
PART_OF_SPLIT = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words for a split, as the page "Structure your repository" of the datasets library lists them."""
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
WORD = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(SPLIT_OF_WORD)})(?=[-._ 0-9/]|$)")
NOTES = re.compile(r".*\.(?:md|py)(?:\.\w+)?", re.IGNORECASE)
"""Names of notes and programs, where the same words mean something else."""

Read = Callable[[str], bytes]
"""Gives the content of one of the folder's files, by its name. Raises CorpusError."""


@dataclass(frozen=True)
class Splits:
    """of: the splits of each file. None: a declaration leaves it out. No entry: nothing says a split of it.

    companions: files that hold no data.  is_declared: by more than words in names.  where: the folder.
    """

    of: dict[str, frozenset[str]]
    companions: frozenset[str]
    is_declared: bool
    where: str

    @property
    def names(self) -> list[str]:
        return sorted(set().union(*self.of.values()))

    def find(self, split: str) -> str | None:
        """The split's name here, which may be another word for it; None if it is missing."""
        known, meant = self.names, SPLIT_OF_WORD.get(split)
        same = [name for name in known if meant and SPLIT_OF_WORD.get(name) == meant]
        return split if split in known else same[0] if len(same) == 1 else None

    def left_out(self, names: Iterable[str], split: str) -> dict[str, str]:
        """Why each of `names` that is not read is not. CorpusError: there is no such split."""
        out = {name: NO_SPLIT for name, splits in self.of.items() if not splits}
        found = self.find(split) if split != ALL else None
        if found:
            out |= {name: OTHER_SPLIT for name, of in self.of.items() if of and found not in of}
            if not self.is_declared and (found != TRAIN or len(self.names) > 1):
                formats = {format_named(name) for name, of in self.of.items() if found in of}
                rest = {name: format_named(name) for name in names if name not in self.of}
                is_data = formats if found == TRAIN else ()
                out |= {
                    name: NO_SPLIT
                    for name, kind in rest.items()
                    if kind and (kind not in is_data or NOTES.fullmatch(name))
                }
        elif split != ALL and (split != TRAIN or self.is_declared):
            there = ", ".join(self.names) or "none: the files that it names are missing"
            why = f"its splits are {there}" if self.of else "nothing in it says a split"
            raise CorpusError(
                f"no split {split}", where=self.where, why=why,
                fix="set the source's split to one of those there are, or to all",
            )  # fmt: skip
        return out | dict.fromkeys(self.companions, COMPANION)


def find_splits(
    names: Sequence[str], read: Read, where: str, known: frozenset[str], *, as_text: bool = False
) -> Splits:
    """names: of the folder's files, relative to it, with '/'.  known: those, and what the source excludes.

    as_text: the source reads every file as text, tables too.

    CorpusError: what declares splits is damaged or names files that are missing.
    """
    of, companions = _saved(set(names), read, where, known)
    rest = [name for name in names if name not in companions and name != CARD]
    front = _front_matter(read(CARD), where) if CARD in names and not of else {}
    config = _default_config(front, where)
    if config:
        of = dict(_of_card(rest, config))
    elif not of:
        of = _by_parts(rest)
    is_declared = bool(of)
    if CARD in names and (is_declared or CARD_KEYS & set(front) or (not as_text and _are_tables(rest))):
        companions.add(CARD)
    of = of or _by_words(rest, as_text=as_text)
    return Splits(of, frozenset(companions), is_declared, where)


def _are_tables(names: Iterable[str]) -> bool:
    formats = {format_named(name) for name in names} - {None}
    return bool(formats) and "text" not in formats


# --- save_to_disk


def _saved(
    names: set[str], read: Read, where: str, known: frozenset[str]
) -> tuple[dict[str, frozenset[str]], set[str]]:
    """The splits of the files under each dataset_dict.json, and the companions of all saved data."""
    of: dict[str, frozenset[str]] = {}
    companions: set[str] = set()
    for name in sorted(names):
        folder, _, last = name.rpartition("/")
        folder += "/" if folder else ""
        if last == STATE and isinstance(listed := _json(read(name)).get("_data_files"), list):
            files = {f"{folder}{file.get('filename')}" for file in listed if isinstance(file, dict)}
            if missing := sorted(files - known):
                raise CorpusError(
                    f"{name} names {missing[0]}, which is missing", where=where,
                    why="the data set was not saved or copied completely", fix="save or copy it again",
                )  # fmt: skip
            neighbours = {
                other for other in names if other.startswith(folder) and "/" not in other[len(folder) :]
            }
            companions |= neighbours - files - {f"{folder}{CARD}"}
        elif last == SPLITS_FILE and isinstance(splits := _json(read(name)).get("splits"), list):
            companions.add(name)
            inside = (other for other in names if other.startswith(folder) and other != name)
            parts = ((other, other[len(folder) :].partition("/")[0]) for other in inside)
            of |= {other: frozenset({part} & set(map(str, splits))) for other, part in parts}
    return of, companions


def _json(content: bytes) -> dict[str, Any]:
    """{} if it is no JSON object: then it is not what `datasets` wrote."""
    try:
        value = parse_json(content.decode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


# --- the card


class _Texts(yaml.SafeLoader):
    """Every scalar is a text, so that no date or number is read into one."""


_Texts.yaml_implicit_resolvers = {}


def _front_matter(content: bytes, where: str) -> dict[str, Any]:
    """The YAML at the start of a card; {} if there is none."""
    match = FRONT_MATTER.match(content.decode("utf-8", "replace"))
    if not match:
        return {}
    try:
        value = parse_yaml(match[1], _Texts)[0]
    except JobError as error:
        if not re.search(r"^configs:", match[1], re.MULTILINE):
            return {}
        raise CorpusError(
            f"the YAML at the start of {CARD} cannot be read", where=where, why=f"{error.what}: {error.why}",
            fix=f"correct it, or put {CARD} into the source's exclude",
        ) from error  # fmt: skip
    return value if isinstance(value, dict) else {}


def _default_config(front: dict[str, Any], where: str) -> dict[str, Any]:
    """The config that is read if none is named; {} if the card has none. CorpusError: none is the default."""
    configs = front.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    if len(configs) > 1:
        default = [c for c in configs if str(c.get("default")).lower() == "true"]
        default = default or [c for c in configs if c.get("config_name") == "default"]
        if not default:
            named = ", ".join(f"{c.get('config_name')} ({_shown(c)})" for c in configs[:5])
            raise CorpusError(
                f"the data set has {len(configs)} configs, and none is the default", where=where,
                why=f"{CARD} names {named}{', ...' if len(configs) > 5 else ''}",
                fix=f"give the files of one as the source's path, or put {CARD} into its exclude",
            )  # fmt: skip
        configs = default
    return configs[0] if configs and ("data_files" in configs[0] or "data_dir" in configs[0]) else {}


def _shown(config: dict[str, Any]) -> str:
    patterns = [pattern for _, of in _patterns(config.get("data_files")) for pattern in of]
    return ", ".join(patterns[:2]) or f"{config.get('data_dir', '')}/"


def _of_card(names: Iterable[str], config: dict[str, Any]) -> Iterator[tuple[str, frozenset[str]]]:
    """Of each name the splits of `config` that have it."""
    folder = str(config.get("data_dir") or "").strip("/")
    folder = f"{folder}/" if folder not in ("", ".") else ""
    inside = [name for name in names if name.startswith(folder)]
    if "data_files" not in config:
        short = [name[len(folder) :] for name in inside]
        found = _by_parts(short) or _by_words(short) or dict.fromkeys(short, frozenset({TRAIN}))
        splits = {folder + name: of for name, of in found.items()}
    else:
        splits = dict.fromkeys(inside, frozenset[str]())
        for split, patterns in _patterns(config["data_files"]):
            wanted = [glob_regex(f"{folder}{pattern.removeprefix('./')}") for pattern in patterns]
            matched = (name for name in inside if any(regex.fullmatch(name) for regex in wanted))
            splits |= {name: splits[name] | {split} for name in matched}
    return ((name, splits.get(name, frozenset())) for name in names)


def _patterns(given: Any) -> list[tuple[str, list[str]]]:
    """(split, its patterns) of a card's data_files, in any form that the hub takes."""
    if isinstance(given, dict):
        return [(str(split), _listed(paths)) for split, paths in given.items()]
    entries = given if isinstance(given, list) else [given]
    if any(isinstance(entry, dict) for entry in entries):
        entries = [entry for entry in entries if isinstance(entry, dict)]
        return [(str(entry.get("split", TRAIN)), _listed(entry.get("path"))) for entry in entries]
    return [(TRAIN, _listed(given))]


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in (paths if isinstance(paths, list) else [paths]) if path]


# --- names


def _by_parts(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """By names such as data/train-00000-of-00001.parquet; {} if no file has such a name."""
    parts = {name: PART_OF_SPLIT.fullmatch(name) for name in names}
    if not any(parts.values()):
        return {}
    return {name: frozenset({part[1]} if part else ()) for name, part in parts.items()}


def _by_words(names: Iterable[str], *, as_text: bool = False) -> dict[str, frozenset[str]]:
    """By the first word for a split in the folders of a name, or else in the file's."""
    found: dict[str, frozenset[str]] = {}
    for name in names:
        word = None if NOTES.fullmatch(name) else WORD.search(name)
        if word and (format_named(name) or (names_no_format(name) and not as_text)):
            found[name] = frozenset({SPLIT_OF_WORD[word[1]]})
    return found
