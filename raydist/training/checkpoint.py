"""Checkpoints: a folder of state that counts once its COMMIT.json, written last, verifies.

    <run>/ledger.jsonl                       a line per commit, on disk before its COMMIT.json
    <run>/checkpoints/step-00000100/         the strategy's files, then COMMIT.json

A ledger line that no COMMIT names is void: its attempt died between the two. Each line names the one
before it, so that from the newest COMMIT the whole history can be added up, also of removed checkpoints.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from raydist import files
from raydist.errors import CheckpointError

COMMIT = "COMMIT.json"
HASH_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Counts:
    """Tokens over all ranks: of documents, of the EOS that the feed adds, of padding."""

    tokens: int = 0
    eos: int = 0
    padding: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.eos + other.eos, self.padding + other.padding)


@dataclass(frozen=True)
class Commit:
    """A checkpoint that counts. step: optimizer steps made.  samples: the data position.

    seen: counts since the start of the run.  evals: of this very step, by source, if there were any.
    ledger: the id of its ledger line.  files: {name: {size, xxh3_128}}.
    """

    path: Path
    step: int
    samples: int
    feed: str
    attempt: int
    world_size: int
    seen: Counts
    evals: dict[str, dict[str, Any]]
    ledger: str = ""
    files: dict[str, dict[str, Any]] | None = None

    @property
    def eval_loss(self) -> float | None:
        """Mean over the sources; None where this step was not evaluated."""
        losses = [result["eval_loss"] for result in self.evals.values()]
        return sum(losses) / len(losses) if losses else None


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def begin(run: Path, step: int) -> Path:
    """An empty folder for the state of `step`. One writer at a time; rank 0 alone calls this."""
    folder = folder_of(run, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(run: Path, planned: Commit, resumed_from: int, since: Commit | None, stretch: Counts) -> Commit:
    """Make the files in planned.path count: checksums, ledger line, COMMIT.json, in this order on disk.

    resumed_from: the step that this attempt began at.  since, stretch: the last commit before this
    one, and what was trained from there to here.
    """
    ledger = f"{planned.attempt}-{planned.step}"
    done = replace(planned, ledger=ledger, files={p.name: _sealed(p) for p in _state_files(planned.path)})
    line = {
        "id": ledger,
        "previous": since.ledger if since else None,
        "attempt": planned.attempt,
        "resumed_from": resumed_from,
        "world_size": planned.world_size,
        "steps": [since.step if since else 0, planned.step],
        "samples": [since.samples if since else 0, planned.samples],
        **asdict(stretch),
    }
    files.append_json(run / "ledger.jsonl", line, flush=True)
    files.write_json(planned.path / COMMIT, {k: v for k, v in asdict(done).items() if k != "path"})
    files.flush_to_disk(planned.path.parent)
    return done


def _state_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != COMMIT)


def _sealed(path: Path) -> dict[str, Any]:
    files.flush_to_disk(path)
    return _measured(path)


def _measured(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return {"size": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def commits(run: Path) -> Iterator[Commit]:
    """Those with a readable COMMIT.json, newest first; their files are not verified here."""
    for path in sorted((run / "checkpoints").glob(f"step-*/{COMMIT}"), reverse=True):
        try:
            yield read_commit(path.parent)
        except CheckpointError:
            continue  # `newest_valid` tells of these


def read_commit(folder: Path) -> Commit:
    try:
        raw = files.read_json(folder / COMMIT)
        return Commit(**{**raw, "path": folder, "seen": Counts(**raw["seen"])})
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            "COMMIT.json cannot be read",
            where=str(folder),
            why=str(error),
            fix="remove the folder; the run goes on from the checkpoint before it",
        ) from error


def verify(found: Commit) -> None:
    """Raises CheckpointError for a file that is missing, cut short or altered."""
    for name, expected in (found.files or {}).items():
        path = found.path / name
        actual = _measured(path) if path.exists() else None
        if actual != expected:
            raise CheckpointError(
                f"{name} does not match its COMMIT.json",
                where=str(path),
                why=f"expected {expected['size']} bytes, {expected['xxh3_128']}; found "
                + (f"{actual['size']} bytes, {actual['xxh3_128']}" if actual else "no such file"),
                fix="remove the folder; the run goes on from the checkpoint before it",
            )


def newest_valid(run: Path, on_damage: Callable[[CheckpointError], None] | None = None) -> Commit | None:
    """The newest checkpoint whose every byte verifies; None for a run without one.

    Damaged ones are passed over, and told to `on_damage`.
    """
    for path in sorted((run / "checkpoints").glob(f"step-*/{COMMIT}"), reverse=True):
        try:
            found = read_commit(path.parent)
            verify(found)
            return found
        except CheckpointError as error:
            if on_damage is not None:
                on_damage(error)
    return None


def best(run: Path) -> Commit | None:
    """The commit of least mean evaluation loss, the newest of equals; None when none was evaluated."""
    evaluated = [found for found in commits(run) if found.eval_loss is not None]
    return min(evaluated, key=lambda found: (found.eval_loss, -found.step), default=None)


def tidy(run: Path, resumed: Commit | None) -> None:
    """For the run's new writer: remove half-written state, set damaged checkpoints aside.

    Every checkpoint newer than the one resumed from is damaged or has no COMMIT.
    """
    for folder in (run / "checkpoints").glob("step-????????"):
        if not (folder / COMMIT).exists():
            shutil.rmtree(folder)
        elif resumed is None or int(folder.name.removeprefix("step-")) > resumed.step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        _cut_torn_line(run / name)


def _cut_torn_line(path: Path) -> None:
    """A killed writer's last line without its newline was never a record, and must not swallow the next."""
    if not path.exists():
        return
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        os.truncate(path, len(whole[0]) + len(whole[1]))


def retain(run: Path, save_total_limit: int) -> None:
    """Keep the newest `save_total_limit` and the best."""
    found = list(commits(run))
    kept = {c.path for c in found[:save_total_limit]} | {c.path for c in [best(run)] if c is not None}
    for old in found:
        if old.path not in kept:
            (old.path / COMMIT).unlink()  # first: half a folder must not look like a checkpoint
            shutil.rmtree(old.path)


def check_same_data(found: Commit, fingerprint: str) -> None:
    if found.feed != fingerprint:
        raise CheckpointError(
            "the checkpoint was trained on other data than this feed gives",
            where=str(found.path),
            why=f"its feed was {found.feed}, this one is {fingerprint}",
            fix="restore the token logs that the run is pinned to, or give the job a new name",
        )
