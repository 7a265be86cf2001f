"""SIGKILL while checkpoints are written behind training: none may leave one that loads and is wrong.

Small runs that save at every step, on one rank and on two, are killed again and again at random moments of
the writing, all ranks or one of them, and go on. The disk is slow, so that most of them strike within a file.
It is right if, after each kill, every checkpoint that counts has the bytes of the undisturbed run's of that
step, none that counted before is lost, model/ is there only once the last one counts, and each run ends with
the undisturbed losses, weights and a ledger that adds up. Exit status 0: all were right.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raydist.folder import COMMIT, RunFolder
from raydist.track.records import read_metrics
from raydist.training import checkpoint
from raydist.training.attempt_spec import AttemptSpec
from tests.chaos.slow_disk import train_on_a_slow_disk
from tests.fork_server import Rank
from tests.train_parts import fork_ranks, losses, make_spec
from tests.unit.parallel.matrix import STRATEGIES
from tests.weights import weight_hash

STEPS = 24
MOST_AFTER_SECONDS = 0.03
MOST_AT_THE_END = 2
"""Kills of a run that is at its last step; then it may end."""
PATIENCE_SECONDS = 120.0
VARIANTS = (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero-2", 2))


@dataclass
class Expected:
    """What the undisturbed run left: each step's files, and its end."""

    files: dict[int, dict[str, dict[str, Any]]]
    losses: dict[int, float]
    weights: str


class Wrong(Exception):
    pass


def main() -> int:
    options = parse()
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="saves-", dir=options.storage))
    print(f"{options.kills} kills, seed {options.seed}, in {folder}", flush=True)
    found: Counter[str] = Counter()
    try:
        undisturbed = {variant: expected(folder, *variant) for variant in VARIANTS[: options.variants]}
        number = 0
        while found["kills"] < options.kills:
            variant = [*undisturbed][number % len(undisturbed)]
            spec = spec_of(folder, *variant, f"run-{number}")
            kill_until_it_ends(spec, undisturbed[variant], options.kills, rng, found)
            print(f"{variant[0]} on {variant[1]}: {dict(found)}", flush=True)
            shutil.rmtree(spec.run)
            number += 1
    except Wrong as wrong:
        print(f"WRONG after {dict(found)}: {wrong}; see {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"all right: {dict(found)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--storage", type=Path, help="(default: the temporary folder)")
    parser.add_argument(
        "--variants", type=int, default=len(VARIANTS), help="the first so many of " + str(VARIANTS)
    )
    return parser.parse_args()


def spec_of(folder: Path, strategy: str, ranks: int, run: str, keep: int = 2) -> AttemptSpec:
    return make_spec(
        folder,
        world_size=ranks,
        run=run,
        strategy=STRATEGIES[strategy],
        train={"max_steps": STEPS, "global_batch_size": 2},
        checkpoint={"save_steps": 1, "save_total_limit": keep, "asynchronous": True},
        eval={"eval_steps": STEPS, "max_tokens": 100},
    )


def expected(folder: Path, strategy: str, ranks: int) -> Expected:
    spec = spec_of(folder, strategy, ranks, f"undisturbed-{strategy}-{ranks}", keep=STEPS)
    processes = begin(spec)
    for process in processes:
        code, said = process.wait(PATIENCE_SECONDS), process.communicate()[1].decode()
        require(code == 0, f"the undisturbed run of {strategy} failed: {said}")
    commits = [*checkpoint.commits(RunFolder(spec.run))]
    require(len(commits) == STEPS, f"{len(commits)} checkpoints count")
    files = {each.step: dict(each.files or {}) for each in commits}
    return Expected(files, losses(spec.run), weight_hash(spec.run / "model"))


def begin(spec: AttemptSpec) -> list[Rank]:
    work = spec.run.parent / f"{spec.run.name}-{spec.attempt}.pickle"
    work.write_bytes(pickle.dumps(functools.partial(train_on_a_slow_disk, spec)))
    return fork_ranks(work, spec.plan.world_size)


def kill_until_it_ends(
    spec: AttemptSpec, good: Expected, most: int, rng: random.Random, found: Counter[str]
) -> None:
    folder, reached, at_the_end = RunFolder(spec.run), 0, 0
    while True:
        ranks = begin(spec)
        target = reached + rng.randint(1, 5)
        wanted = found["kills"] < most and at_the_end < MOST_AT_THE_END
        if wanted and strikes(spec, ranks, target, rng):
            found["kills"] += 1
            half = [s for s in folder.checkpoint_steps() if not (folder.checkpoint(s) / COMMIT).exists()]
            found["while writing"] += bool(half)
            within = any(n < whole(good, s) for s in half if (n := size_of(folder.checkpoint(s))))
            found["within a file"] += within
            found["at the end"] += STEPS in half
            at_the_end += reached + 1 >= STEPS or STEPS in half
        codes = [rank.wait(PATIENCE_SECONDS) for rank in ranks]
        reached = judge(folder, good, reached)
        if all(code == 0 for code in codes) and folder.model.exists():
            break
        spec = replace(spec, attempt=spec.attempt + 1)
    require(losses(spec.run) == good.losses, f"{spec.run}: other losses")
    require(weight_hash(folder.model) == good.weights, f"{spec.run}: other weights")
    for commit in checkpoint.commits(folder):
        damage = checkpoint.disagreement(folder, commit)
        require(damage is None, f"{spec.run}: {damage}")
    found["runs ended"] += 1


def strikes(spec: AttemptSpec, ranks: list[Rank], target: int, rng: random.Random) -> bool:
    """SIGKILL to all ranks, or to one, once the checkpoint of this step, or a later one, is being written.

    False where they end before.
    """
    folder, end, begun = RunFolder(spec.run), time.monotonic() + PATIENCE_SECONDS, False
    while not begun or not any(step >= min(target, STEPS) for step in folder.checkpoint_steps()):
        # from then on, what the attempt before left half-written is gone
        begun = begun or any(r["attempt"] == spec.attempt for r in read_metrics(folder))
        require(time.monotonic() < end, f"{folder.path} does not go on")
        if all(rank.poll() is not None for rank in ranks):
            return False
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, MOST_AFTER_SECONDS))
    struck = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
    living = [rank for rank in struck if rank.poll() is None]
    for rank in living:
        rank.kill()
    return bool(living)


def judge(folder: RunFolder, good: Expected, reached: int) -> int:
    """The newest step that counts. Raises Wrong."""
    newest = 0
    for step in folder.committed_steps():
        commit = checkpoint.read_commit(folder.checkpoint(step))
        checkpoint.verify(commit)
        require(dict(commit.files or {}) == good.files[step], f"{commit.path} counts, and is wrong")
        newest = step
    require(newest >= reached, f"{folder.path}: step {reached} counted, and now {newest} does")
    valid = checkpoint.newest_valid(folder)
    require((valid.step if valid else 0) == newest, f"{folder.path}: the newest is not {newest}")
    require(newest == STEPS or not folder.model.exists(), f"{folder.path}: model/ is there at step {newest}")
    return newest


def whole(good: Expected, step: int) -> int:
    return sum(int(file["size"]) for file in good.files[step].values())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def require(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


if __name__ == "__main__":
    sys.exit(main())
