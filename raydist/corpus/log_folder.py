"""The folder of a token log: every name in it, and how each file is written and read.

    <storage>/tokens/<fingerprint>/
        plan.json                identity, head of the manifest, and slices; written first
        shards/00000-000.arrow   documents; the numbers are the slice's, and the shard's in the slice
        quarantine/00000.jsonl   records of the slice that could not be read, if there are any
        slices/00000.json        the slice's commit record; written after its other files
        quarantine.jsonl         the records of all slices that could not be read, if there are any
        manifest.json            written last: the token log is complete
        .<name>.<12 hex>.tmp     a file that is being written

The plan, the commit records and the manifest carry their own checksums; the commit records and the manifest
hold those of the shards. Each file appears complete, by rename. So a preparation may be killed at any
instant, and two may make the same slice at once: both write the same bytes. raydist.corpus.log describes the
content of the shards.

In a bucket the names are the same, and a node has here what it needed so far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from raydist import files
from raydist.bucket import mirror
from raydist.errors import LogError
from raydist.files import read_jsonl, write_bytes
from raydist.places import uri_of
from raydist.sealed import read_sealed, write_sealed

PLAN, MANIFEST, QUARANTINE = "plan.json", "manifest.json", "quarantine.jsonl"

_OURS = re.compile(
    rf"{re.escape(PLAN)}|{re.escape(MANIFEST)}|{re.escape(QUARANTINE)}"
    r"|shards/\d{5,}-\d{3,}\.arrow|slices/\d{5,}\.json|quarantine/\d{5,}\.jsonl"
    r"|(?:\w+/)?\.[\w.-]+\.[0-9a-f]{12}\.tmp"
)
"""Names that raydist writes, as paths within the folder, finished or temporary."""

MADE_AGAIN = "run `raydist prepare` on the job that makes the token log: it makes again what is damaged"

Record = dict[str, Any]


class LogFolder:
    """Paths and records of one token log. The constructor touches no file.

    A commit record is {shards: [{name, n_documents, n_tokens, n_bytes, size, xxh3_128}], n_quarantined,
    n_empty}; `size` is the file's, in bytes. Slices are numbered from 0 in their planned order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_file = path / MANIFEST
        self.quarantine_file = path / QUARANTINE
        self.quarantine = path / "quarantine"
        self.plan_file = path / PLAN
        self._sizes: dict[str, int] | None = None

    def begun(self) -> bool:
        return mirror.pull_file(self.plan_file)

    def complete(self) -> bool:
        return mirror.pull_file(self.manifest_file)

    # --- the plan, and the manifest ----------------------------------------------------------------

    def write_plan(self, plan: Record) -> None:
        """{identity, log: the manifest's head, slices}"""
        write_sealed(self.plan_file, plan)

    def read_plan(self) -> Record:
        """{} if there is none yet. Raises LogError if it is damaged."""
        if not mirror.pull_file(self.plan_file):
            return {}
        return read_sealed(self.plan_file, LogError, MADE_AGAIN, keys=("identity", "log", "slices"))

    def write_manifest(self, manifest: Record) -> None:
        write_sealed(self.manifest_file, manifest)

    def read_manifest(self) -> Record:
        """Raises FileNotFoundError, or LogError if it is damaged."""
        mirror.pull_file(self.manifest_file)
        return read_sealed(self.manifest_file, LogError, MADE_AGAIN, keys=("format",))

    # --- slices ------------------------------------------------------------------------------------

    def shard(self, name: str) -> Path:
        return self.path / "shards" / name

    def shard_name(self, number: int, nth: int) -> str:
        """The file name of a slice's nth shard."""
        return f"{number:05d}-{nth:03d}.arrow"

    def has_shard(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard's file exists in its full size. record: the shard's, from a commit record."""
        path = self.shard(record["name"])
        size = int(record["size"])
        if uri_of(path) is not None:
            return self._size_in_bucket(path) == size
        return path.is_file() and path.stat().st_size == size

    def _size_in_bucket(self, path: Path) -> int | None:
        """All shards are listed once; those that were written since are asked for."""
        if self._sizes is None:
            self._sizes = mirror.sizes_in(path.parent)
        if path.name not in self._sizes and (size := mirror.size_of(path)) is not None:
            self._sizes[path.name] = size
        return self._sizes.get(path.name)

    def commit_file(self, number: int) -> Path:
        return self.path / _commit(number)

    def write_commit(self, number: int, record: Record) -> None:
        """To be called once all other files of the slice are written."""
        write_sealed(self.commit_file(number), record)

    def read_commit(self, number: int) -> Record | None:
        """None for a slice that is not committed. Raises LogError if the record is damaged."""
        path = self.commit_file(number)
        if not path.exists() and not mirror.pull_file(path):
            return None
        return read_sealed(path, LogError, MADE_AGAIN, keys=("shards", "n_quarantined", "n_empty"))

    def remove_commit(self, number: int) -> None:
        """The slice will be made again."""
        files.remove(self.commit_file(number))

    def committed(self) -> list[int]:
        """Numbers of the slices with a commit record, in order."""
        mirror.pull(self.path / "slices")
        names = (path.stem for path in self.path.glob("slices/*.json"))
        return sorted(int(name) for name in names if name.isdigit())

    def is_whole(self, number: int, record: Record) -> bool:
        """Whether all files of a committed slice exist."""
        quarantine = self.path / _quarantine(number)
        shards = all(self.has_shard(shard) for shard in record["shards"])
        return shards and (not record["n_quarantined"] or mirror.pull_file(quarantine))

    # --- records that could not be read ------------------------------------------------------------

    def write_quarantine(self, number: int, bad: Iterable[Record]) -> None:
        """bad: {file, row or byte, reason} of each unreadable record of a slice; see corpus.log."""
        write_bytes(self.path / _quarantine(number), b"".join(orjson.dumps(each) + b"\n" for each in bad))

    def read_quarantine(self, number: int) -> list[Record]:
        mirror.pull_file(self.path / _quarantine(number))
        return read_jsonl(self.path / _quarantine(number))

    def join_quarantines(self, numbers: Sequence[int]) -> None:
        """Join the quarantine files of these slices into one."""
        mirror.pull(self.quarantine)
        parts = [(self.path / _quarantine(number)).read_bytes() for number in numbers]
        write_bytes(self.quarantine_file, b"".join(parts))

    # --- the end -----------------------------------------------------------------------------------

    def tidy(self, slices: Mapping[int, Record]) -> None:
        """Remove raydist's files except the plan and these slices'. slices: commit records by number."""
        kept = {PLAN, *(_commit(number) for number in slices)}
        kept |= {f"shards/{shard['name']}" for record in slices.values() for shard in record["shards"]}
        kept |= {_quarantine(number) for number, record in slices.items() if record["n_quarantined"]}
        for file in [file for file in self.path.rglob("*") if file.is_file() and not file.is_symlink()]:
            name = file.relative_to(self.path).as_posix()
            if name not in kept and _OURS.fullmatch(name):
                files.remove(file)
        for name in mirror.names_below(self.path):
            if name not in kept and _OURS.fullmatch(name):
                files.remove(self.path / name)


def _commit(number: int) -> str:
    return f"slices/{number:05d}.json"


def _quarantine(number: int) -> str:
    return f"quarantine/{number:05d}.jsonl"
