"""Every file of a run or of a token log, compared with the checksums that were written with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydist import files
from raydist.corpus.log import Shard, gathered, open_log
from raydist.corpus.log_folder import MADE_AGAIN, LogFolder
from raydist.corpus.tokenizer import check_trained
from raydist.errors import CheckpointError, LogError, RaydistError, RunError
from raydist.feed.cache import is_intact
from raydist.folder import COMMIT, DAMAGED, RunFolder
from raydist.run.lifecycle import began_with
from raydist.sealed import read_sealed_lines
from raydist.storage import Storage
from raydist.track.humanize import size
from raydist.track.records import read_metrics
from raydist.training import ledger
from raydist.training.checkpoint import disagreement, read_commit, verify

THREADS = 4
Say = Callable[[str], None]


@dataclass
class Verified:
    """n_files with n_bytes were read; `damage` was found in them, each with what to do."""

    n_files: int = 0
    n_bytes: int = 0
    damage: list[RaydistError] = field(default_factory=list)

    @contextmanager
    def reading(self, *paths: Path) -> Iterator[None]:
        """Counts these files, and keeps the error that the block raises."""
        found = [path for path in paths if path.is_file()]
        self.n_files += len(found)
        self.n_bytes += sum(path.stat().st_size for path in found)
        try:
            yield
        except RaydistError as error:
            self.damage.append(error)

    def to_json(self) -> dict[str, Any]:
        parts = ("what", "where", "why", "fix")
        damage = [{name: getattr(error, name) for name in parts} for error in self.damage]
        return {"files": self.n_files, "bytes": self.n_bytes, "damage": damage}


def verify_log(path: Path, say: Say = lambda text: None) -> Verified:
    """A token log, complete or not: its plan, records and manifest, and every byte of its shards."""
    done, folder = Verified(), LogFolder(path)
    plan, manifest, records = None, None, {}
    with done.reading(folder.plan_file):
        plan = folder.read_plan()
    for number in folder.committed():
        with done.reading(folder.commit_file(number)):
            records[number] = folder.read_commit(number) or {}
    if folder.complete() or not folder.begun():
        with done.reading(folder.manifest_file):
            open_log(path)
        if not done.damage:
            manifest = folder.read_manifest()
    if manifest:
        manifest.pop("left_out", None)  # of the source's folders, which no slice knows
    if manifest and plan and manifest != {**plan["log"], **gathered([records[n] for n in sorted(records)])}:
        done.damage.append(
            LogError(
                f"{folder.manifest_file.name} does not say what the records of the slices say",
                where=str(folder.manifest_file),
                fix=MADE_AGAIN,
            )
        )
    listed = [shard for record in records.values() for shard in record["shards"]]
    listed = listed or (manifest or {}).get("shards", [])
    say(f"token log {path.name}: {len(listed):,} shards, {size(sum(shard['size'] for shard in listed))}")

    shards = [Shard(path=folder.shard(record["name"]), **record) for record in listed]
    with ThreadPoolExecutor(THREADS) as pool:
        for shard, verified in [(shard, pool.submit(shard.verify)) for shard in shards]:
            with done.reading(shard.path):
                verified.result()
    return done


def verify_run(folder: RunFolder, say: Say = lambda text: None) -> Verified:
    """A run's or a sweep's records, checkpoints, ledger and model; its token logs and pack indexes."""
    done = Verified()
    with done.reading(folder.marker):
        folder.check_marker()
    with done.reading(folder.job_file):
        began_with(folder)
    with done.reading(folder.status_file):
        status = folder.status()
        if status.get("state") == DAMAGED:
            raise RunError(status["error"], where=str(folder.status_file), fix="resume the run")
    with done.reading(folder.metrics_file):
        _check_metrics(folder)
    with done.reading(folder.trials_file):
        read_sealed_lines(folder.trials_file)
    _verify_checkpoints(done, folder, say)
    _verify_model(done, folder)
    pins: dict[str, Any] = {}
    with done.reading(folder.data_file):
        pins = folder.data().get("pins", {})
    if pins:
        with done.reading(*Path(pins["tokenizer"]["folder"]).glob("tokenizer*.json")):
            check_trained(Path(pins["tokenizer"]["folder"]))
    for name in sorted({pin for kind in ("logs", "eval_logs") for pin in pins.get(kind, {}).values()}):
        _verify_pinned(done, Storage(folder.path.resolve().parent), name, say)
    return done


def _check_metrics(folder: RunFolder) -> None:
    whole = folder.metrics_file.read_bytes().count(b"\n") if folder.metrics_file.exists() else 0
    if lost := whole - len(read_metrics(folder)):
        raise RunError(
            f"{lost:,} of {whole:,} lines of {folder.metrics_file.name} are no records",
            where=str(folder.metrics_file),
            why="they are left out of the curves and the report; training does not read them",
            fix="nothing, or restore the file from a copy",
        )


def _verify_checkpoints(done: Verified, folder: RunFolder, say: Say) -> None:
    steps, newest = folder.committed_steps(), None
    say(f"{len(steps)} checkpoints")
    for step in steps:
        path = folder.checkpoint(step)
        with done.reading(*path.glob("*")):
            try:
                found = read_commit(path)
                verify(found)
                newest = found
            except CheckpointError:
                if (path / COMMIT).exists():  # else a run that goes on has removed it meanwhile
                    raise
    with done.reading(folder.ledger_file):
        damage = ledger.damage(folder, newest.line if newest else "")
        if damage := damage or (disagreement(folder, newest) if newest else None):
            raise damage


def _verify_model(done: Verified, folder: RunFolder) -> None:
    """Every file of model/ as it was exported. A model that was removed as a whole is no damage."""
    recorded: dict[str, Any] = {}
    with done.reading():
        recorded = folder.model_record()
    folder.fetch_model()
    for name, measured in recorded.items() if folder.model.is_dir() else ():
        path = folder.model / name
        with done.reading(path):
            if not path.is_file() or files.measure(path) != measured:
                raise RunError(
                    f"model/{name} is {'not what was exported' if path.is_file() else 'missing'}",
                    where=str(path),
                    fix="restore it from a copy, unless you changed it yourself",
                )


def _verify_pinned(done: Verified, storage: Storage, name: str, say: Say) -> None:
    found = verify_log(storage.tokens / name, say)
    done.n_files, done.n_bytes = done.n_files + found.n_files, done.n_bytes + found.n_bytes
    done.damage += found.damage
    for path in sorted(storage.pack_indexes.glob(f"{name}-*/*")):
        with done.reading(path):
            if not is_intact(path):
                raise LogError(
                    "a pack index is damaged",
                    where=str(path),
                    fix="nothing: it is made again when it is needed",
                )
