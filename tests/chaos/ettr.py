"""The effective training time ratio (ETTR) of runs with faults: a short real one, and 54 simulated days.

    real       a small run of two workers; one of them is SIGKILLed again and again
                 │ restart, checkpoint, step: measured
                 ▼
    simulated  54 days with 419 faults

The long trace has the numbers of Llama 3 405B (arXiv 2407.21783): 419 unexpected interruptions in 54 days,
78% of them by hardware. In both parts a fault strikes every 18 checkpoint intervals on average, at random.
In the long trace it costs the steps since the last checkpoint and a restart. A fault of hardware takes a node
away as well: the run goes on with fewer workers; when the node is back, it makes a checkpoint and restarts.

The ratio counts time, not speed: steps of fewer workers take longer, and count as they are. The figures of
the simulation are those of the small run on this machine; a large model takes longer to load.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from raydist.folder import RunFolder
from raydist.track.ettr import EffectiveTime, effective_time
from raydist.track.humanize import duration
from raydist.track.records import Record, read_metrics
from tests.chaos.processes import submitted
from tests.whole_run import whole_job, write_corpus

DAYS, FAULTS, INTERVALS, HARDWARE = 54, 419, 18, 0.78
AIM = 0.97
REPAIR_SECONDS = 3600.0
"""A node that was lost is back after so long."""
TRACES = 20
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Figures:
    """Seconds: of a restart, from the fault to the first step; of a checkpoint, as long as training waits for
    it; of a step.

    save_steps: steps between checkpoints.
    """

    restart: float
    stall: float
    step: float
    save_steps: int


# --- simulated


@dataclass
class Simulated:
    """Seconds of the whole, and how they were spent."""

    wall: float
    steps: float = 0.0
    again: float = 0.0
    restarts: float = 0.0
    checkpoints: float = 0.0

    @property
    def ratio(self) -> float:
        return self.steps / self.wall


def simulate(figures: Figures, wall: float, faults: Sequence[float], back: Sequence[float] = ()) -> Simulated:
    """Train from 0 to `wall`. faults: times at which a worker is lost. back: at which a node is back."""
    spent, begun = Simulated(wall), 0.0
    events = [(at, False) for at in faults if at < wall] + [(at, True) for at in back if at < wall]
    for at, planned in [*sorted(events), (wall, True)]:
        if at > begun:
            _train(figures, at - begun, spent, kept=planned)
        until = min(wall, at + figures.restart + figures.stall * planned)
        spent.restarts += max(0.0, until - max(at, begun))
        begun = max(begun, until)
    return spent


def _train(figures: Figures, seconds: float, spent: Simulated, *, kept: bool) -> None:
    """So many seconds of steps and checkpoints. kept: whether what follows the last one is."""
    steps = figures.save_steps * figures.step
    whole, rest = divmod(seconds, steps + figures.stall)
    after = min(rest, steps)
    spent.steps += whole * steps + after * kept
    spent.again += after * (not kept)
    spent.checkpoints += whole * figures.stall + rest - after


def long_trace(figures: Figures, rng: random.Random) -> Simulated:
    """54 days with 419 faults at any moments, and a checkpoint for each 18th of their mean distance."""
    wall = DAYS * 86400.0
    save_steps = round(wall / FAULTS / INTERVALS / figures.step)
    faults = sorted(rng.uniform(0, wall) for _ in range(FAULTS))
    back = [at + REPAIR_SECONDS for at in faults if rng.random() < HARDWARE]
    figures = Figures(figures.restart, figures.stall, figures.step, save_steps)
    return simulate(figures, wall, faults, back)


# --- real


class Run:
    """A small run of two workers that goes on until it is stopped."""

    def __init__(self, folder: Path, save_steps: int) -> None:
        write_corpus(folder / "text.jsonl")
        job = whole_job(folder / "text.jsonl", folder / "runs")
        job["train"] = {**job["train"], "max_steps": 1_000_000}
        job["scaling"] = {"num_workers": 2, "max_failures": 1000}
        job["checkpoint"] = {"save_steps": save_steps}
        job["eval"] = {"eval_steps": 1_000_000, "max_tokens": 2000}
        self.folder = RunFolder(folder / "runs" / job["name"])
        self.submission = submitted(job, folder)

    def records(self, kind: str) -> list[Record]:
        return [record for record in read_metrics(self.folder) if record["kind"] == kind]

    def trained(self, attempt: int, count: int = 1) -> Record:
        """The record of the step of that number of this attempt or a later one, once there is one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not self.submission.ended:
            steps = [record for record in self.records("train") if record["attempt"] >= attempt]
            if len(steps) >= count:
                return steps[count - 1]
            time.sleep(0.1)
        raise SystemExit(f"no step was trained: {self.submission.output[-3000:]}")

    def step_seconds(self) -> float:
        return statistics.median(record["step_seconds"] for record in self.records("train"))

    def stop(self) -> None:
        self.folder.stop_flag.touch()
        self.submission.wait(PATIENCE_SECONDS)


def real(
    folder: Path, n_faults: int, interval: float, rng: random.Random
) -> tuple[Run, Figures, list[float]]:
    """A run with so many kills. interval: seconds between checkpoints, about.

    Returns it, what was measured, and the times of the kills, in seconds from the run's begin.
    """
    pilot = Run(folder / "pilot", 1000)
    pilot.trained(1, 30)
    save_steps = max(1, round(interval / pilot.step_seconds()))
    pilot.submission.kill_everything()
    run = Run(folder / "run", save_steps)
    run.trained(1)
    restarts, struck, begin = list[float](), list[float](), time.time()
    for attempt in range(1, n_faults + 1):
        at = begin + rng.expovariate(1 / (INTERVALS * interval))
        while time.time() < at:
            time.sleep(0.05)
        if not run.submission.kill("worker"):
            raise SystemExit(f"no worker to kill: {run.submission.output[-3000:]}")
        struck.append(time.time())
        step = run.trained(attempt + 1)
        restarts.append(step["time"] - step["step_seconds"] - struck[-1])
        begin = time.time()
        say(f"  kill {attempt} of {n_faults}: the next step began {restarts[-1]:.1f} s later")
    at = begin + rng.expovariate(1 / (INTERVALS * interval))
    while time.time() < at:
        time.sleep(0.05)
    run.stop()
    first = min(record["time"] for record in run.records("start"))
    (ended,) = (r for r in run.records("phases") if r["attempt"] == n_faults + 1)
    commits = sum(record["attempt"] == n_faults + 1 for record in run.records("commit"))
    stall = ended["seconds"].get("checkpoint", 0.0) / max(1, commits)
    figures = Figures(statistics.median(restarts), stall, run.step_seconds(), save_steps)
    return run, figures, [at - first for at in struck]


def main(arguments: Sequence[str] | None = None) -> float:
    options = parse(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="ettr-", dir=options.storage) as name:
        for part in ("pilot", "run"):
            (Path(name) / part).mkdir()
        run, figures, struck = real(Path(name), options.faults, options.interval, rng)
        measured = effective_time(read_metrics(run.folder))
        assert measured is not None, "steps were trained"
        tell_real(run, figures, struck, measured)
    return tell_simulated(figures, options.seed)


def tell_real(run: Run, figures: Figures, struck: list[float], measured: EffectiveTime) -> None:
    begun = run.records("start")[0]
    start = sum(spent for name, spent in begun["seconds"].items() if name not in ("plan", "prepare"))
    first = measured.wall_seconds - start
    alike = simulate(figures, first, struck)
    say(
        f"real: {len(struck)} workers killed in {duration(measured.wall_seconds)}, a checkpoint every"
        f" {figures.save_steps} steps of {figures.step:.3f} s: ETTR {measured.ratio:.1%}"
        f" (simulated with these kills: {alike.steps / measured.wall_seconds:.1%})\n"
        f"  a restart takes {figures.restart:.1f} s, a checkpoint {figures.stall:.3f} s,"
        f" the first start {start:.1f} s"
    )


def tell_simulated(figures: Figures, seed: int) -> float:
    """The mean ETTR of the long traces."""
    traces = [long_trace(figures, random.Random(f"{seed} {n}")) for n in range(TRACES)]
    ratios = [trace.ratio for trace in traces]
    mean = statistics.mean(ratios)

    def share(name: str) -> str:
        return f"{statistics.mean(getattr(trace, name) / trace.wall for trace in traces):.2%}"

    say(
        f"simulated: {DAYS} days, {FAULTS} faults, a checkpoint every"
        f" {DAYS * 86400 / FAULTS / INTERVALS:.0f} s, {TRACES} traces: ETTR {mean:.2%}"
        f" ({min(ratios):.2%} to {max(ratios):.2%}; aim {AIM:.0%})\n"
        f"  lost: {share('again')} steps trained again, {share('restarts')} restarts,"
        f" {share('checkpoints')} checkpoints"
    )
    return mean


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=4, help="real ones (default: %(default)s)")
    parser.add_argument(
        "--interval",
        type=float,
        default=8.0,
        help="seconds between two checkpoints of the real run (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", type=Path, help="a folder to work in (default: the temporary one)")
    return parser.parse_args(arguments)


def say(*words: Any) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    raise SystemExit(main() < AIM)
