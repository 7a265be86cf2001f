"""Checkpoints: a folder of state that counts once its COMMIT.json, written last, verifies.

    <run>/ledger.jsonl                       a line per commit, on disk before its COMMIT.json; see ledger
    <run>/checkpoints/step-00000100/         the strategy's files, then COMMIT.json

    Checkpoints.save ─▶ Strategy.save ─▶ SaveHandle ─ done ─▶ Checkpoints.poll ─▶ ledger line, COMMIT.json

A ledger line that no COMMIT names is void: its attempt died between the two. Each line names the commit
before its own, so that from the newest COMMIT the whole history can be added up, also of removed checkpoints.
COMMIT.json carries its own checksum, those of the state's files, and a copy of its ledger line.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist import files
from raydist.background import in_background
from raydist.bucket import mirror
from raydist.errors import CheckpointError
from raydist.folder import COMMIT, RunFolder, taken_by_another
from raydist.parallel import loss_scale
from raydist.parallel.world import World
from raydist.places import uri_of
from raydist.sealed import read_sealed, sealed
from raydist.training import ledger

if TYPE_CHECKING:
    from raydist.parallel.strategy import SaveHandle, Strategy

WAIT_SECONDS = 1.0
GO_ON = "submit the job again: the run goes on from the checkpoint before it"


@dataclass(frozen=True)
class Counts:
    """Tokens over all ranks: of documents, of the EOS that the feed adds, of padding, of the BOS it adds."""

    tokens: int = 0
    eos: int = 0
    padding: int = 0
    bos: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_json(self) -> dict[str, int]:
        """bos is left out where there is none, as in the records of older versions."""
        return {name: n for name, n in asdict(self).items() if n or name != "bos"}


@dataclass(frozen=True)
class Skipped:
    """Steps that changed nothing, since the run began: how many.

    ranges: their samples, [start, stop) each, in order and apart.  tokens: document tokens in these.
    """

    steps: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    tokens: int = 0

    @property
    def samples(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def holds(self, start: int, stop: int) -> bool:
        """Whether one of the samples [start, stop) is skipped."""
        return any(lo < stop and start < hi for lo, hi in self.ranges)

    def add(self, start: int, stop: int, *, steps: int, tokens: int) -> Skipped:
        """With samples [start, stop), which lie behind all that are skipped so far."""
        *before, (first, end) = self.ranges or ((start, start),)
        ranges = (*before, (first, stop)) if end == start else (*self.ranges, (start, stop))
        return Skipped(self.steps + steps, ranges, self.tokens + tokens)

    def counts(self) -> dict[str, int]:
        """As the ledger has them."""
        return {"samples": self.samples, "tokens": self.tokens}

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "samples": self.ranges, "tokens": self.tokens}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Skipped:
        return cls(given["steps"], tuple((lo, hi) for lo, hi in given["samples"]), given["tokens"])


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is. step: steps made, with those that were skipped.  samples: the data position.

    seen: counts of what was trained since the start of the run; skipped: what was not.  evals: results of
    this very step by source, if there are any.  forgotten: updates before the optimizer was reset, in an
    extended run.  guards: what the guard of the steps remembers, as
    `Guard.to_json` gives it; None where there is none.
    """

    step: int = 0
    samples: int = 0
    seen: Counts = Counts()
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: Skipped = Skipped()
    guards: dict[str, Any] | None = None
    forgotten: int = 0

    @property
    def updates(self) -> int:
        """Steps that the optimizer took since it began, or was reset."""
        return self.step - self.skipped.steps - self.forgotten

    @property
    def eval_loss(self) -> float | None:
        """Mean over the sources, in nats; None where this step was not evaluated."""
        losses = [result["eval_loss"] for result in self.evals.values()]
        return sum(losses) / len(losses) if losses else None


@dataclass(frozen=True, kw_only=True)
class Commit(Position):
    """A position whose state is in `path` and counts. feed: the fingerprint of the data.

    ledger: the id of its ledger line.  line: that line, "" in a COMMIT.json of an older version, which has no
    checksum either.  files: {name: {size, xxh3_128}}. Both are known to rank 0 and to readers.
    """

    path: Path
    feed: str
    attempt: int
    world_size: int
    ledger: str = ""
    line: str = ""
    files: dict[str, dict[str, Any]] | None = None

    @property
    def state(self) -> Path:
        """The folder of its files."""
        return state_folder(self.path, self.attempt)


def state_folder(checkpoint: Path, attempt: int) -> Path:
    """The folder of the state's files: that of the checkpoint; in a bucket, one for each attempt below it.

    There an attempt that was given up for dead may still write, and cannot spoil what another wrote.
    """
    return checkpoint / f"attempt-{attempt}" if uri_of(checkpoint) is not None else checkpoint


class Checkpoints:
    """What one attempt saves, and what it goes on from. Collective: all ranks call each method alike."""

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        strategy: Strategy,
        *,
        feed: Callable[[int], str],
        attempt: int,
        keep: int,
    ) -> None:
        """feed: gives the fingerprint of so many samples."""
        self.folder, self.world, self.strategy = folder, world, strategy
        self.feed, self.attempt, self.keep = feed, attempt, keep
        self.last: Commit | None = None
        self.resumed_from = 0
        self._removing: list[Future[None]] = []
        self.behind = False
        """Whether training goes on while a checkpoint is written: see behind.py."""
        self._saving: tuple[Position, SaveHandle, Callable[[float], bool]] | None = None

    def resume(self, say: Callable[[str], None]) -> Commit | None:
        """The newest checkpoint that verifies, as rank 0 finds it, loaded; None for a run without one.

        say: called with what was damaged. Raises CheckpointError when the checkpoint was trained on other
        data or does not fit the model, or when the ledger has lost lines for good.
        """
        self.folder.refresh(exactly=self.world.is_main)
        found = go_on_from(self.folder, say) if self.world.is_main else None
        step = self.world.from_main(found.step if found else -1)
        if step < 0:
            return None
        self.last = found or read_commit(self.folder.checkpoint(step))
        have(self.last)
        check_same_data(self.last, self.feed(self.last.samples))
        self.strategy.load(self.last.state, self.last.updates)
        self.resumed_from = step
        return self.last

    @property
    def saving(self) -> Position | None:
        """What is being written."""
        return self._saving[0] if self._saving else None

    def save(self, position: Position, also: Callable[[float], bool] = lambda within: True) -> None:
        """Begin to write the state at `position`. `poll` commits it once it is written.

        also: whether what else must come first on this rank is done, or is within so many seconds.
        """
        assert self._saving is None, "one checkpoint at a time"
        folder = state_folder(self.folder.checkpoint(position.step), self.attempt)
        if self.world.is_main:
            wait(self._removing)
        if self.world.is_main or (self.folder.remote and self.world.local_rank == 0):
            begin(folder)
        self.world.barrier()  # the folder is there, and empty
        self._saving = position, self.strategy.save(folder, behind=self.behind), also

    def poll(self) -> Commit | None:
        """The commit of what was being written, if all ranks have written it by now."""
        return self._commit() if self._saving is not None and self.world.all(self._done(0.0)) else None

    def finish(self) -> Commit | None:
        """Wait for what is being written, and commit it."""
        if self._saving is None:
            return None
        while not self.world.all(self._done(WAIT_SECONDS)):
            pass  # in turns, so that no collective waits for as long as another rank's disk takes
        return self._commit()

    def close(self) -> None:
        """The attempt has ended. What is being written is given up; what is being removed is gone then."""
        self.strategy.close()
        wait(self._removing)

    def go_back(self, step: int) -> Commit | None:
        """Load the newest good checkpoint up to `step`, in place; None where there is none."""
        found = _good(self.folder, step) if self.world.is_main else None
        at = self.world.from_main(found.step if found else -1)
        if at < 0:
            return None
        found = found or read_commit(self.folder.refresh().checkpoint(at))
        have(found)
        self.strategy.load(found.state, found.updates)
        return found

    def load_weights(self, step: int) -> Commit:
        """Those of an earlier commit, without its optimizer state."""
        found = read_commit(self.folder.checkpoint(step))
        have(found)
        if self.world.is_main:
            verify(found)
        self.strategy.load(found.state, None)
        return found

    def _remove_old(self) -> None:
        """In a thread, as large files take their time: none of them counts any more."""
        old: list[Path] = []
        retain(self.folder, self.keep, old.append)

        def remove() -> None:
            for path in old:
                files.remove_folder(path)

        if old:
            self._removing = [in_background(remove, "raydist-remove")]

    def _done(self, within: float) -> bool:
        assert self._saving is not None
        _, handle, also = self._saving
        return handle.done(within) and also(within)

    def _commit(self) -> Commit:
        assert self._saving is not None
        (position, handle, _), self._saving = self._saving, None
        written = {name: file for part in self.world.gather(handle.files) for name, file in part.items()}
        made = Commit(
            **{each.name: getattr(position, each.name) for each in fields(Position)},
            path=self.folder.checkpoint(position.step),
            feed=self.feed(position.samples),
            attempt=self.attempt,
            world_size=self.world.world_size,
            ledger=f"{self.attempt}-{position.step}",
            files=written,
        )
        if self.world.is_main:
            made = commit(self.folder, made, self.resumed_from, self.last)
            self._remove_old()
        self.last = made
        return made


def _good(folder: RunFolder, step: int) -> Commit | None:
    """The newest commit up to `step` that verifies, and after which no skipped steps were under way."""
    for found in commits(folder):
        if found.step <= step and not (found.guards or {}).get("in_a_row"):
            with contextlib.suppress(CheckpointError):
                verify(found)
                return found
    return None


def begin(folder: Path) -> None:
    """An empty folder. One writer at a time; rank 0 alone calls this, or one rank of each node."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def commit(folder: RunFolder, made: Commit, resumed_from: int, since: Commit | None) -> Commit:
    """Make made.files, which are on disk, count: ledger line, COMMIT.json, in this order on disk.

    resumed_from: the step that this attempt began at.  since: the last commit before this one.
    Raises CheckpointError where a file is not seen here as the rank wrote it.
    """
    done = replace(made, files=dict(sorted((made.files or {}).items())))
    for name, file in (done.files or {}).items():
        path = done.state / name
        if _size(path) != file["size"]:
            raise CheckpointError(
                f"a file of the checkpoint that another worker wrote is not there: {name}",
                where=str(path),
                why=f"rank 0 sees no such file of {file['size']} bytes, so nobody could resume from it",
                fix="let storage be a bucket, or a folder that all nodes share, at the same path",
            )
    values: dict[str, Any] = {
        "id": done.ledger,
        "previous": since.ledger if since else None,
        "attempt": done.attempt,
        "resumed_from": resumed_from,
        "world_size": done.world_size,
        "steps": [since.step if since else 0, done.step],
        "samples": [since.samples if since else 0, done.samples],
        **(done.seen - since.seen if since else done.seen).to_json(),
    }
    if done.skipped != (before := since.skipped if since else Skipped()):
        values["skipped"] = {name: n - before.counts()[name] for name, n in done.skipped.counts().items()}
    folder.flush()
    done = replace(done, line=ledger.append(folder, values))
    with taken_by_another(done.path / COMMIT):
        files.create_json(done.path / COMMIT, sealed(_record(done)))
    files.flush_to_disk(folder.checkpoints)
    return done


def _record(done: Commit) -> dict[str, Any]:
    """The content of COMMIT.json; without what there is none of, as in those of older versions."""
    record = {**asdict(done), "seen": done.seen.to_json(), "skipped": done.skipped.to_json()}
    left_out = {"path", *["skipped"] * (done.skipped == Skipped()), *["guards"] * (done.guards is None)}
    left_out |= set() if done.forgotten else {"forgotten"}
    return {name: value for name, value in record.items() if name not in left_out}


def _size(path: Path) -> int | None:
    """Of a file, where it counts; None if there is none."""
    if uri_of(path) is not None:
        return mirror.size_of(path)
    return path.stat().st_size if path.is_file() else None


def commits(folder: RunFolder) -> Iterator[Commit]:
    """Those with a readable COMMIT.json, newest first; their files are not verified here."""
    for step in reversed(folder.committed_steps()):
        try:
            yield read_commit(folder.checkpoint(step))
        except CheckpointError:
            continue  # `newest_valid` reports these


def read_commit(path: Path) -> Commit:
    """Raises CheckpointError for a COMMIT.json that is damaged, or of another step than its folder."""
    file = path / COMMIT
    try:
        raw = read_sealed(file, CheckpointError, GO_ON)
        known = {"path": path, "seen": Counts(**raw["seen"]), "skipped": _skipped(path, raw)}
        found = Commit(**{**raw, **known})
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        why = f"it does not hold what raydist writes there: {error}"
        raise CheckpointError(f"{COMMIT} is damaged", where=str(file), why=why, fix=GO_ON) from error
    if path.name != f"step-{found.step:08d}":
        raise CheckpointError(
            f"{COMMIT} is of another checkpoint",
            where=str(file),
            why=f"it says step {found.step}, and its folder is {path.name}",
            fix=GO_ON,
        )
    return found


def have(found: Commit) -> None:
    """The state's files on this node, where the run is in a bucket."""
    for name, expected in (found.files or {}).items():
        mirror.fetch(found.state / name, expected)


def _skipped(path: Path, raw: dict[str, Any]) -> Skipped:
    """Older versions counted steps that fp16 skipped in a file of their own, and their samples as trained."""
    if "skipped" in raw:
        return Skipped.from_json(raw["skipped"])
    of_scale = path / loss_scale.FILE
    return Skipped(steps=files.read_json(of_scale)["skipped"] if of_scale.exists() else 0)


def verify(found: Commit) -> None:
    """Raises CheckpointError for a file that is missing, cut short or altered."""
    have(found)
    for name, expected in (found.files or {}).items():
        path = found.state / name
        actual = files.measure(path) if path.is_file() else None
        if actual != expected:
            raise CheckpointError(
                f"{name} does not match its {COMMIT}",
                where=str(path),
                why=f"expected {expected['size']} bytes, {expected['xxh3_128']}; found "
                + (f"{actual['size']} bytes, {actual['xxh3_128']}" if actual else "no such file"),
                fix=GO_ON,
            )


def newest_valid(
    folder: RunFolder, on_damage: Callable[[CheckpointError], None] = lambda damage: None
) -> Commit | None:
    """The newest checkpoint whose every byte verifies; None for a run without one.

    Damaged ones are passed over, and reported to `on_damage`. Raises CheckpointError if there are some
    without a checksum, and the ledger leads to none of them.
    """
    disagreeing: CheckpointError | None = None
    for step in reversed(folder.committed_steps()):
        try:
            found = read_commit(folder.checkpoint(step))
            verify(found)
            if found.line:
                return found
        except CheckpointError as error:
            on_damage(error)
            continue
        damage = disagreement(folder, found)
        if damage is None:
            return found
        on_damage(damage)
        disagreeing = disagreeing or damage
    if disagreeing is not None:
        raise disagreeing
    return None


def disagreement(folder: RunFolder, found: Commit) -> CheckpointError | None:
    """What is wrong where the ledger does not lead to this commit."""
    counts = asdict(found.seen), found.skipped.counts()
    why = ledger.contradiction(folder, found.ledger, found.step, found.samples, *counts)
    if why is None:
        return None
    return CheckpointError(
        f"{folder.ledger_file.name} and {COMMIT} of step {found.step} disagree",
        where=f"{folder.ledger_file}; {found.path / COMMIT}",
        why=f"the ledger: {why}",
        fix=f"{ledger.RESTORE}; or restore {COMMIT}",
    )


def go_on_from(folder: RunFolder, say: Callable[[str], None] = lambda what: None) -> Commit | None:
    """`newest_valid` for the run's new writer: makes the ledger whole up to it, removes what is half-written.

    say: called with what was damaged. Raises CheckpointError where the ledger has lost lines for good.
    """

    def passed_over(damage: CheckpointError) -> None:
        say(f"a damaged checkpoint was passed over: {damage.what} ({damage.where})")

    files.cut_torn_line(folder.metrics_file)  # first: what is said is appended there
    found = newest_valid(folder, passed_over)
    copies = [each.line for each in commits(folder) if each.line]
    if said := ledger.make_whole(folder, found.line if found else "", copies):
        say(said)
    if found is not None and (damage := disagreement(folder, found)):
        raise damage
    tidy(folder, found)
    return found


def best(folder: RunFolder) -> Commit | None:
    """The commit of least mean evaluation loss, the newest of equals; None when none was evaluated.

    Of an extended run only those count that were evaluated on the sources that it has now.
    """
    evaluated = [found for found in commits(folder) if found.eval_loss is not None]
    evaluated = [found for found in evaluated if found.evals.keys() == evaluated[0].evals.keys()]
    return min(evaluated, key=lambda found: (found.eval_loss, -found.step), default=None)


def tidy(folder: RunFolder, resumed: Commit | None) -> None:
    """For the run's new writer: remove half-written state, set damaged checkpoints aside.

    Every checkpoint newer than the one resumed from is damaged or has no COMMIT.
    """
    for step in folder.checkpoint_steps(in_bucket=True):
        path = folder.checkpoint(step)
        if path.exists() and not path.is_dir():
            path.unlink()
        elif not (path / COMMIT).exists():
            files.remove_folder(path)
        elif resumed is None or step > resumed.step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            mirror.publish_folder(aside)
            mirror.remove_folder(path, first=COMMIT)


def retain(
    folder: RunFolder, save_total_limit: int, remove: Callable[[Path], object] = files.remove_folder
) -> None:
    """Keep the newest `save_total_limit`, the best, and the one that skipped steps would lead back to.

    The others no longer count, and are removed.
    """
    found = list(commits(folder))
    kept = {c.path for c in found[:save_total_limit]} | {c.path for c in [best(folder)] if c is not None}
    back_to = (found[0].guards or {}).get("back_to") if found else None
    kept |= {c.path for c in found if c.step == back_to}
    for old in found:
        if old.path not in kept:
            files.remove(old.path / COMMIT)  # first: half a folder must not look like a checkpoint
            remove(old.path)


def check_same_data(found: Commit, fingerprint: str) -> None:
    if found.feed != fingerprint:
        raise CheckpointError(
            "the checkpoint was trained on other data than this feed gives",
            where=str(found.path),
            why=f"its feed was {found.feed}, this one is {fingerprint}",
            fix="restore the token logs that the run is pinned to, or give the job a new name",
        )
