"""The promise, shown: a run that is killed twice ends with the very weights of one that is left alone.

The quickstart job, made shorter, runs twice from the same token logs: once undisturbed; once with a worker
killed half-way, from which it recovers by itself, and later everything killed, and is then submitted
again. All kills are SIGKILL, timed by the run's own metrics.jsonl, in the middle of a step. Exit status 0:
the final weights are equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chaos.processes import Submission
from tests.weights import weight_hash

JOB = Path(__file__).resolve().parents[2] / "jobs" / "quickstart.yaml"
WORKER_KILL_AT, EVERYTHING_KILL_AT = 0.4, 0.7  # shares of the run's steps
PATIENCE_SECONDS = 900.0


def main() -> int:
    options = parse()
    for name in ("kill-undisturbed", "kill-killed"):
        shutil.rmtree(options.storage / name, ignore_errors=True)
    undisturbed = Run("kill-undisturbed", options)
    say("1. undisturbed")
    undisturbed.start()
    undisturbed.finish()
    killed = Run("kill-killed", options)
    say("2. with a worker killed, then everything")
    killed.start()
    killed.wait_for_share(WORKER_KILL_AT, attempt=1)
    say(f"   SIGKILL of a training worker after step {killed.position()[1]}")
    killed.kill_worker()
    killed.wait_for_share(EVERYTHING_KILL_AT, attempt=2)
    say(f"   it went on by itself; SIGKILL of everything after step {killed.position()[1]}")
    killed.kill_everything()
    say("3. submitted again")
    killed.start()
    killed.finish()
    return verdict(undisturbed, killed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--storage", type=Path, default=Path("runs"), help="storage folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=60, help="length of the runs (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="override a key of the job, as in raydist")
    return parser.parse_args()


class Run:
    """One name in the storage folder, and the processes that work for it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.folder, self.steps = name, options.storage / name, options.steps
        settings = {
            "name": name,
            "storage": options.storage,
            "train.max_tokens": "null",
            "train.max_steps": options.steps,
            "train.logging_steps": 1,
            "checkpoint.save_steps": max(1, options.steps // 8),
            "eval.eval_steps": options.steps,
            "eval.max_tokens": 4000,
        }
        self.settings = [*(f"{key}={value}" for key, value in settings.items()), *options.set]

    def start(self) -> None:
        command = [sys.executable, "-m", "raydist", "submit", str(JOB)]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        self.submission = Submission([*command, *sets], (self.folder.parent / f"{self.name}.log").absolute())
        self.submission.start()

    def finish(self) -> None:
        status = self.submission.wait(PATIENCE_SECONDS)
        if status != 0:
            raise SystemExit(f"{self.name} ended with exit status {status}; {self._last_lines()}")

    def wait_for_share(self, share: float, *, attempt: int) -> None:
        """Until `attempt` has done this share of the steps."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.position() < (attempt, share * self.steps):
            if self.submission.ended or self.position()[0] > attempt or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} is not where it should be killed; {self._last_lines()}")
            time.sleep(0.05)

    def position(self) -> tuple[int, int]:
        """(attempt, step) of the last training record."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        trained = [record for line in lines if (record := json.loads(line))["kind"] == "train"]
        return (trained[-1]["attempt"], trained[-1]["step"]) if trained else (0, 0)

    def kill_worker(self) -> None:
        if not self.submission.kill("worker"):
            raise SystemExit("found no training worker to kill")

    def kill_everything(self) -> None:
        """Driver, raylet, gcs, workers."""
        self.submission.kill_everything()

    def _last_lines(self) -> str:
        lines = self.submission.output.splitlines()[-20:]
        return "\n".join([f"the end of {self.submission.log}:", *lines])


def verdict(undisturbed: Run, killed: Run) -> int:
    hashes = [weight_hash(run.folder / "model") for run in (undisturbed, killed)]
    for run, value in zip((undisturbed, killed), hashes, strict=True):
        say(f"   {run.name:18} {value}")
    equal = hashes[0] == hashes[1]
    say("equal: the killed run ended with the same weights, bit for bit" if equal else "NOT EQUAL")
    return 0 if equal else 1


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
