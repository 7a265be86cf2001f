"""Faults at random moments: whatever happens, the run must end in the bytes of one that was left alone.

Each fault strikes a small job of two workers, in one of five phases: while it prepares its tokens, trains,
exports its model, runs as a sweep, or lies on the disk between two submissions. Then the job is submitted
again, as its message says, until it ends. It is right if

    - each submission ended by itself, was killed here, or said in a sentence what was wrong;
    - the last one ended with the undisturbed weights, losses, token log and account of every token;
    - `raydist verify` finds nothing in the folder, and no process is left.

The seed decides which faults strike and when; processes make their own speed, so that a fault of one seed
does not strike at the very same instant again. Exit status 0: all were right.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raydist import files
from raydist.cluster.connect import ray_session
from raydist.folder import RunFolder
from raydist.storage import Storage
from tests.chaos.damage import DAMAGE, FILES, damage
from tests.chaos.processes import Submission
from tests.weights import weight_hash
from tests.whole_run import STEPS, losses, reached, whole_job, write_corpus

PATIENCE_SECONDS = 400.0
HANG_SECONDS = 25
"""Longer than a small run's longest silence on a busy machine."""
FROZEN_SECONDS = 10.0
PER_FILE = 2
PREPARE_MAKES = ("plan.json", "a slice's record")
"""Training does not read these; `raydist prepare` makes them again, as `raydist verify` says."""
SAID = {0, 7, 8, 9}
"""Exit statuses of a submission that a fault ended with a sentence: training, cluster or storage."""
MIB = 2**20
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def main() -> int:
    options = parse()
    if not options.list:
        enter_namespace()
    catalogue = [fault for fault in faults() if not options.only or options.only in fault.name]
    if options.list:
        print("\n".join(fault.name for fault in catalogue))
        return 0
    rng = random.Random(options.seed)
    drawn = draw(catalogue, options.faults, rng) if options.faults else some_of_each(catalogue, rng)
    storage = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.storage))
    say(f"{len(drawn)} faults of {len(catalogue)} kinds, seed {options.seed}, in {storage}")
    results = []
    with ray_session(2, 1):  # for the submissions of this process
        bench = Bench(storage)
        for number, fault in enumerate(drawn, start=1):
            result = bench.strike(number, fault, random.Random(f"{options.seed} {number} {fault.name}"))
            results.append(result)
            say(f"{number:3d}/{len(drawn)}  {result}")
    (storage / "results.json").write_bytes(orjson.dumps([vars(result) for result in results]))
    return conclude(results, storage)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faults",
        type=int,
        help=f"how many, of all kinds alike (default: one of each kind; {PER_FILE} kinds for each file)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--storage", type=Path, help="a folder to work in (default: the temporary one)")
    parser.add_argument("--list", action="store_true", help="print the names of the faults, and strike none")
    return parser.parse_args()


def enter_namespace() -> None:
    """Start again where file systems can be mounted, if this machine allows it."""
    inside = "RAYDIST_CHAOS_INSIDE"
    if inside in os.environ:
        return
    os.environ[inside] = "no" if subprocess.run([*NAMESPACE, "true"], check=False).returncode else "yes"
    if os.environ[inside] == "yes":
        os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, *sys.argv])
    say("this machine has no mount namespaces: no disk will be full")


def some_of_each(catalogue: list[Fault], rng: random.Random) -> list[Fault]:
    """In random order: every fault of a process or a disk, and PER_FILE damages of each file."""
    by_file: dict[str, list[Fault]] = {}
    for fault in catalogue:
        by_file.setdefault(fault.name.partition(",")[0], []).append(fault)
    drawn = [fault for of_one in by_file.values() for fault in rng.sample(of_one, min(PER_FILE, len(of_one)))]
    return rng.sample(drawn, len(drawn))


def draw(catalogue: list[Fault], n: int, rng: random.Random) -> list[Fault]:
    """n faults in random order: each kind as often as any other, or once more."""
    drawn: list[Fault] = []
    while len(drawn) < n:
        drawn += rng.sample(catalogue, min(len(catalogue), n - len(drawn)))
    return drawn


def conclude(results: list[Result], storage: Path) -> int:
    missed = [result for result in results if result.missed]
    wrong = [result for result in results if result.problems and not result.missed]
    for phase in PHASES:
        of_phase = [result for result in results if result.fault.startswith(f"{phase}:")]
        right = sum(not result.problems for result in of_phase)
        refused = sum(bool(result.refused) and not result.problems for result in of_phase)
        if of_phase:
            say(f"{phase:8} {len(of_phase):3d} struck, {right:3d} right, {refused:3d} of them refused first")
    say(f"{len(results)} struck, {len(results) - len(wrong) - len(missed)} right, {len(missed)} missed")
    if wrong or missed:
        say(f"what is left of them is in {storage}")
        return 1
    shutil.rmtree(storage)
    return 0


# --- faults --------------------------------------------------------------------------------------

PHASES = ("prepare", "train", "export", "sweep", "files")


@dataclass
class Case:
    """A submission under way that a fault is about to strike. cure: what makes it right again, if needed."""

    submission: Submission
    folder: RunFolder
    rng: random.Random
    cure: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Fault:
    """strike: False if there was nothing to strike, since the phase was over.

    own_disk: the storage is a file system of its own.
    """

    name: str
    strike: Callable[[Case], bool]
    own_disk: bool = False

    @property
    def phase(self) -> str:
        return self.name.partition(":")[0]


@dataclass
class Result:
    fault: str
    at: str = ""
    seconds: float = 0.0
    exits: list[int | None] = field(default_factory=list)
    refused: str = ""
    problems: list[str] = field(default_factory=list)
    missed: bool = False

    def __str__(self) -> str:
        verdict = "MISSED" if self.missed else "WRONG" if self.problems else "right"
        how = f"exits {', '.join(map(str, self.exits))}" + (f"; {self.refused}" if self.refused else "")
        told = "".join(f"\n         {problem}" for problem in self.problems)
        return f"{verdict}  {self.fault} {self.at}  ({self.seconds:.0f} s; {how}){told}"


def faults() -> list[Fault]:
    """One of each kind."""
    kills = {
        "prepare": ("reader", "driver", "raylet", "gcs"),
        "train": ("worker", "driver", "controller", "raylet", "gcs"),
        "export": ("worker", "driver", "controller", "raylet", "gcs"),
        "sweep": ("trial", "worker", "driver", "controller", "raylet", "gcs"),
    }
    found = [
        Fault(f"{phase}: SIGKILL of the {name}", partial(_kill, name))
        for phase, names in kills.items()
        for name in names
    ]
    for phase in kills:
        found.append(Fault(f"{phase}: SIGKILL of everything", _kill_everything))
        found.append(Fault(f"{phase}: everything frozen for {FROZEN_SECONDS:.0f} s", _freeze))
    found.append(Fault("train: a worker hangs", _hang))
    for phase in ("prepare", "train", "export"):
        found.append(Fault(f"{phase}: no space left", _fill, own_disk=True))
    for phase in ("prepare", "train"):
        found.append(Fault(f"{phase}: permission lost", _lock))
    found += [
        Fault(f"files: {file}, {what}", partial(_damage, file, what)) for file in FILES for what in DAMAGE
    ]
    return [each for each in found if not each.own_disk or os.environ.get("RAYDIST_CHAOS_INSIDE") != "no"]


def _kill(name: str, case: Case) -> bool:
    deadline = time.monotonic() + 20
    while not case.submission.kill(name):
        if case.submission.ended or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _kill_everything(case: Case) -> bool:
    case.submission.kill_everything()
    return True


def _freeze(case: Case) -> bool:
    case.submission.freeze(FROZEN_SECONDS)
    return True


def _hang(case: Case) -> bool:
    return case.submission.stop_one("worker")


def _fill(case: Case) -> bool:
    """Leave some KiB, which the next large file does not fit into."""
    ballast = case.folder.path.parent / "ballast"
    free = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, free - case.rng.randrange(64) * 1024)))
    case.cure = ballast.unlink
    return True


def _lock(case: Case) -> bool:
    """No new file in the run's folder, nor in those of its checkpoints and of the token logs."""
    storage = Storage(case.folder.path.parent)
    logs = [*storage.tokens.glob("*/s*")] if storage.tokens.exists() else []
    locked = [path for path in (case.folder.path, case.folder.checkpoints, *logs) if path.is_dir()]
    for path in locked:
        path.chmod(0o555)

    def cure() -> None:
        for path in locked:
            path.chmod(0o755)

    case.cure = cure
    return True


def _damage(file: str, what: str, case: Case) -> bool:
    case.cure = damage(FILES[file](case.folder), what, case.rng)
    return True


# --- the bench -----------------------------------------------------------------------------------


class Bench:
    """Jobs, what they end as when they are left alone, and a run that was killed half-way."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.corpus = storage / "text.jsonl"
        write_corpus(self.corpus, n_documents=1000)
        self._endings: dict[str, dict[str, Any]] = {}
        self._half: Path | None = None

    def strike(self, number: int, fault: Fault, rng: random.Random) -> Result:
        """One fault, and all that follows it. What was right is removed."""
        result, began = Result(fault.name), time.monotonic()
        place = self.storage / f"{number:03d}"
        try:
            with own_disk(place) if fault.own_disk else contextlib.nullcontext():
                if fault.phase == "files":
                    self._strike_files(place, fault, rng, result)
                else:
                    self._strike_process(place, fault, rng, result)
        except Exception:  # noqa: BLE001 - the other faults are still to strike
            result.problems.append(traceback.format_exc())
        result.seconds = time.monotonic() - began
        if not result.problems:
            shutil.rmtree(place, ignore_errors=True)
        return result

    # --- a process is struck

    def _strike_process(self, place: Path, fault: Fault, rng: random.Random, result: Result) -> None:
        sweep = fault.phase == "sweep"
        job, undisturbed = self.job(place, sweep=sweep), self.ending(sweep=sweep)
        if fault.phase in ("train", "export"):  # the tokens are there
            for shared in ("tokens", "tokenizers"):
                shutil.copytree(self.storage / "undisturbed" / shared, place / shared)
        submission, folder = self.submission(job, place), folder_of(job)
        case = Case(submission, folder, rng)
        submission.start()
        try:
            result.at = wait_for_moment(fault.phase, submission, folder, rng)
            if not result.at or not fault.strike(case):
                result.missed = True
                result.problems.append(f"the phase was over: {submission.output[-1000:]}")
                return
            self._let_it_end(
                case, result, killed="driver" in fault.name or "SIGKILL of everything" in fault.name
            )
            if result.exits[-1] != 0:
                case.cure()
                submission.start()
                result.exits.append(submission.wait(PATIENCE_SECONDS))
                if result.exits[-1] != 0:
                    result.problems.append(
                        f"submitted again it did not end well: {submission.output[-3000:]}"
                    )
                    return
            self._compare(folder, undisturbed, result, sweep=sweep)
            if left := left_over(submission):
                result.problems.append(f"processes are left: {left}")
        finally:
            case.cure = lambda: None
            submission.kill_everything()

    def _let_it_end(self, case: Case, result: Result, *, killed: bool) -> None:
        submission = case.submission
        result.exits.append(submission.wait(PATIENCE_SECONDS))
        code, output = result.exits[-1], submission.output
        if "Traceback" in output:
            result.problems.append(f"a traceback: {output[-3000:]}")
        if killed:
            return
        if code not in SAID:
            result.problems.append(f"exit status {code}: {output[-3000:]}")
        if code:
            result.refused = next((line for line in output.splitlines() if line.startswith("error")), "")
            if case.folder.status().get("state") != "failed" and "cannot be written" not in output:
                result.problems.append(f"status: {case.folder.status()}")

    # --- files are struck between two submissions

    def _strike_files(self, place: Path, fault: Fault, rng: random.Random, result: Result) -> None:
        undisturbed = self.ending(sweep=False)
        shutil.copytree(self.half_done(), place, symlinks=True)
        job = self.job(place, sweep=False)
        case = Case(Submission([], place / "log"), folder_of(job), rng)
        fault.strike(case)
        code, output = submit_here(job)
        result.exits.append(code)
        if code != 0:
            result.refused = " ".join(line.strip() for line in output.splitlines()[-5:])[:300]
            if code is None:
                result.problems.append(output[-3000:])
            case.cure()
            code, output = submit_here(job)
            result.exits.append(code)
            if code != 0:
                result.problems.append(f"restored it did not end well: {output[-3000:]}")
                return
        if any(file in fault.name for file in PREPARE_MAKES):
            code, output = submit_here(job, "prepare")
            result.exits.append(code)
        self._compare(case.folder, undisturbed, result, curves="metrics" not in fault.name)

    def _compare(
        self,
        folder: RunFolder,
        undisturbed: dict[str, Any],
        result: Result,
        *,
        sweep: bool = False,
        curves: bool = True,
    ) -> None:
        found = ending(folder, sweep=sweep)
        for key, value in undisturbed.items():
            if found[key] != value and (curves or key != "losses"):
                result.problems.append(f"{key}: {short(found[key])}, undisturbed {short(value)}")
        verified = subprocess.run(
            [sys.executable, "-m", "raydist", "verify", str(folder.path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if verified.returncode and curves:
            result.problems.append(f"raydist verify: {verified.stdout[-1500:]}{verified.stderr[-1500:]}")

    # --- what all faults share

    def job(self, storage: Path, *, sweep: bool) -> dict[str, Any]:
        storage.mkdir(parents=True, exist_ok=True)
        job = whole_job(self.corpus, storage)
        job["scaling"] = {"num_workers": 1 if sweep else 2, "hang_timeout": HANG_SECONDS}
        if sweep:
            job["name"] = "sweep"
            job["train"] = {**job["train"], "max_steps": STEPS // 2}
            job["tune"] = {
                "search": {"train.lr": {"grid": [1e-3, 3e-3]}},
                "scheduler": "none",
                "concurrency": 1,
            }
        return job

    def submission(self, job: dict[str, Any], place: Path) -> Submission:
        path = place / f"{job['name']}.yaml"
        files.write_text(path, yaml.safe_dump(job))
        command = [*able_to_be_refused(), sys.executable, "-m", "raydist", command_for(job), str(path)]
        return Submission(command, self.storage / f"{place.name}.log")

    def ending(self, *, sweep: bool) -> dict[str, Any]:
        """That of the job when it is left alone."""
        name = "sweep" if sweep else "run"
        if name not in self._endings:
            job = self.job(self.storage / "undisturbed", sweep=sweep)
            code, output = submit_here(job)
            if code != 0:
                raise SystemExit(f"undisturbed, the {name} did not end well: {output}")
            self._endings[name] = ending(folder_of(job), sweep=sweep)
        return self._endings[name]

    def half_done(self) -> Path:
        """A storage whose run was killed between two checkpoints."""
        if self._half is None:
            place = self.storage / "half"
            job = self.job(place, sweep=False)
            submission = self.submission(job, place)
            submission.start()
            while not reached(folder_of(job), STEPS * 2 // 3, 1):
                if submission.ended:
                    raise SystemExit(f"the run to be damaged did not get far: {submission.output}")
                time.sleep(0.02)
            submission.kill_everything()
            self._half = place
        return self._half


def folder_of(job: dict[str, Any]) -> RunFolder:
    return RunFolder(Path(job["storage"]) / job["name"])


def command_for(job: dict[str, Any]) -> str:
    return "tune" if "tune" in job else "submit"


def submit_here(job: dict[str, Any], name: str = "") -> tuple[int | None, str]:
    """The job in this process, on a Ray that all share: exit status and output. name: of another command.

    The status is None, and the output a traceback, if anything but a RaydistError came out.
    """
    from raydist.cli import main as command

    path = Path(job["storage"]) / f"{job['name']}.yaml"
    files.write_text(path, yaml.safe_dump(job))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            command([name or command_for(job), str(path)])
    except SystemExit as ended:
        return (ended.code if isinstance(ended.code, int) else 0), output.getvalue()
    except BaseException:  # noqa: BLE001 - the fault that is looked for
        return None, f"{output.getvalue()}\n{traceback.format_exc()}"
    return 0, output.getvalue()


def wait_for_moment(phase: str, submission: Submission, folder: RunFolder, rng: random.Random) -> str:
    """Until a random moment of the phase, which is returned in words; empty if the driver ends before."""
    storage = Storage(folder.path.parent)
    if phase == "prepare":
        n = rng.randrange(6)
        at, come = f"with {n} slices", lambda: len(list(storage.tokens.glob("*/slices/*.json"))) >= n
        if n == 0:
            at, come = "as it begins", lambda: folder.status().get("state") == "preparing"
    elif phase == "train":
        step = rng.randrange(1, STEPS - 4)
        at, come = f"after step {step}", lambda: reached(folder, step, 1)
    elif phase == "export":
        at, come = "after the last step", lambda: reached(folder, STEPS, 1)
    else:
        trial, step = rng.randrange(2), rng.randrange(1, STEPS // 2 - 4)
        of_trial = RunFolder(folder.path.with_name(f"{folder.path.name}-{trial:03d}"))
        at, come = f"after step {step} of trial {trial}", lambda: reached(of_trial, step, 1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not come():
        if submission.ended or time.monotonic() > deadline:
            return ""
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    return at


def ending(folder: RunFolder, *, sweep: bool = False) -> dict[str, Any]:
    """What must be equal."""
    if sweep:
        trials = sorted(folder.path.parent.glob(f"{folder.path.name}-???"))
        of_trials = [ending(RunFolder(trial)) for trial in trials]
        return {"trials": of_trials, "best": best_of(folder)}
    return {
        "state": folder.status().get("state"),
        "weights": weight_hash(folder.model),
        "losses": losses(folder),
        "audit": folder.data().get("audit"),
        "logs": log_hashes(Storage(folder.path.parent)),
    }


def best_of(folder: RunFolder) -> Any:
    best = yaml.safe_load(folder.best_file.read_text())
    return {key: value for key, value in best.items() if key != "storage"}


def log_hashes(storage: Storage) -> dict[str, Any]:
    return {
        path.name: {name: files.measure(path / name) for name in sorted(names_in(path))}
        for path in sorted(storage.tokens.iterdir())
    }


def names_in(path: Path) -> Iterator[str]:
    return (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def left_over(submission: Submission) -> list[str]:
    """Its processes that are still there after a while."""
    deadline = time.monotonic() + 15
    while (left := submission.processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    with contextlib.suppress(psutil.Error):
        return [" ".join(process.cmdline())[:80] or process.name() for process in left]
    return []


@contextmanager
def own_disk(place: Path) -> Iterator[None]:
    """A file system in memory at `place`, which everything that starts in the block sees."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def able_to_be_refused() -> list[str]:
    """root may write into any folder; a command behind this may not."""
    rights = "-dac_override,-dac_read_search"
    command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    refused = subprocess.run([*command, "true"], check=False, capture_output=True).returncode
    return [] if refused else command


def short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 200 else f"{text[:200]}..."


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
