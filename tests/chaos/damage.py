"""Files of a run and of its token log, and what a bad disk, a bad copy or a careless hand makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from raydist.folder import COMMIT, RunFolder
from raydist.storage import Storage


def _newest(folder: RunFolder) -> Path:
    return folder.checkpoint(folder.checkpoint_steps()[-1])


def _largest(paths: list[Path]) -> Path:
    return max(paths, key=lambda path: path.stat().st_size)


def _log(folder: RunFolder) -> Path:
    return next(Storage(folder.path.parent).tokens.iterdir())


FILES: dict[str, Callable[[RunFolder], Path]] = {
    "COMMIT.json": lambda folder: _newest(folder) / COMMIT,
    "a checkpoint's shard": lambda folder: _largest(
        [path for path in _newest(folder).iterdir() if path.name != COMMIT]
    ),
    "ledger.jsonl": lambda folder: folder.ledger_file,
    "metrics.jsonl": lambda folder: folder.metrics_file,
    "status.json": lambda folder: folder.status_file,
    "data.json": lambda folder: folder.data_file,
    "raydist-job.yaml": lambda folder: folder.job_file,
    "the marker": lambda folder: folder.marker,
    "manifest.json": lambda folder: _log(folder) / "manifest.json",
    "plan.json": lambda folder: _log(folder) / "plan.json",
    "a slice's record": lambda folder: min((_log(folder) / "slices").iterdir()),
    "a shard of tokens": lambda folder: _largest(list((_log(folder) / "shards").iterdir())),
    "a pack index": lambda folder: _largest(
        [path for path in Storage(folder.path.parent).pack_indexes.rglob("*") if path.is_file()]
    ),
    "the tokenizer": lambda folder: next(Storage(folder.path.parent).tokenizers.glob("*/tokenizer.json")),
}


def _flipped(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "one bit": _flipped,
    "cut": lambda data, rng: data[: rng.randrange(1, len(data))],
    "emptied": lambda data, rng: b"",
    "zeroed": lambda data, rng: bytes(len(data)),
    "foreign": lambda data, rng: b'{"a": [1, 2]}\n',
    "removed": lambda data, rng: None,
}
"""From a file's bytes to those that take their place; None: the file is removed."""


def damage(path: Path, what: str, rng: random.Random) -> Callable[[], None]:
    """Damage the file. The function that is returned restores it."""
    before = path.read_bytes()
    after = DAMAGE[what](before, rng)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)

    def restore() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before)

    return restore
