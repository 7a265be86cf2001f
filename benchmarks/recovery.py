"""How long a run takes from a fault to its next trained step, and where the time goes.

Twice: a worker is killed, and the run goes on by itself; everything is killed, and the job is submitted
again. Each is compared with bare Ray in the same run: two workers that import torch and transformers and do
one all_reduce, by a second `TorchTrainer.fit` of one process, and from the start of a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raydist.folder import RunFolder
from raydist.track.records import read_metrics
from tests.chaos.processes import submitted
from tests.whole_run import whole_job, write_corpus

AIMS = {"worker": 15.0, "everything": 30.0}
PATIENCE_SECONDS = 240.0
PHASES = ("plan", "prepare", "start", "imports", "load", "compile", "probe")

BARE = """
import time
began = time.time()
import json, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work():
    import torch, transformers
    from transformers import AutoModelForCausalLM
    torch.distributed.all_reduce(torch.ones(1))

ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for turn in range(2):
    TorchTrainer(work, scaling_config=ScalingConfig(num_workers=2),
                 run_config=RunConfig(name=f"bare-{turn}", storage_path=sys.argv[1])).fit()
    print(json.dumps(time.time() - began), flush=True)
    began = time.time()
"""


def main() -> None:
    options = parse()
    found: dict[str, list[dict[str, float]]] = {"worker": [], "everything": []}
    bare: dict[str, list[float]] = {"worker": [], "everything": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "text.jsonl")
        run = Run(folder)
        for _ in range(options.repeats):
            for fault in found:
                found[fault].append(run.recover(fault))
        run.submission.kill_everything()
        for _ in range(options.repeats):
            for fault, seconds in zip(("everything", "worker"), bare_seconds(folder), strict=True):
                bare[fault].append(seconds)
    tell(found, bare)
    if options.json:
        options.json.write_text(json.dumps({"raydist": found, "bare": bare}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each fault (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


class Run:
    """A long job of two workers."""

    def __init__(self, folder: Path) -> None:
        job = whole_job(folder / "text.jsonl", folder / "runs")
        job["train"] = {**job["train"], "max_steps": 100_000}
        job["scaling"] = {"num_workers": 2, "max_failures": 100}
        job["eval"] = {"eval_steps": 100_000, "max_tokens": 2000}
        self.folder = RunFolder(folder / "runs" / job["name"])
        self.submission = submitted(job, folder)

    def recover(self, fault: str) -> dict[str, float]:
        """Seconds from the fault to the next trained step, in all and by phase."""
        attempt = self.trained(after=time.time())["attempt"]
        time.sleep(2.0)  # some steps and a checkpoint further
        struck = time.time()
        if fault == "worker":
            self.submission.kill("worker")
        else:
            self.submission.kill_everything()
            struck = time.time()
            self.submission.start()
        step = self.trained(after=struck, attempt=attempt + 1)
        (begun,) = [r for r in read_metrics(self.folder) if r["kind"] == "resume" and r["attempt"] > attempt]
        seconds = {name: begun["seconds"].get(name, 0.0) for name in PHASES}
        total = step["time"] - struck
        first_step = step["time"] - begun["time"]
        noticed = total - first_step - sum(seconds.values())
        return {"total": total, "until noticed": noticed, **seconds, "first step": first_step}

    def trained(self, *, after: float, attempt: int = 1) -> dict[str, Any]:
        """The first record of a step of this attempt or a later one, written after a time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for record in read_metrics(self.folder):
                if record["kind"] == "train" and record["attempt"] >= attempt and record["time"] > after:
                    return record
            if self.submission.ended:
                break
            time.sleep(0.1)
        raise SystemExit(f"no step was trained: {self.submission.output[-3000:]}")


def bare_seconds(folder: Path) -> tuple[float, float]:
    """Of a process from its start, and of a second `fit` in it."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder / "bare")], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.replace(".", "").isdigit()]
    if len(lines) != 2:
        raise SystemExit(f"the bare program failed: {done.stderr[-3000:]}")
    return float(lines[0]), float(lines[1])


def tell(found: dict[str, list[dict[str, float]]], bare: dict[str, list[float]]) -> None:
    for fault, times in found.items():
        medians = {name: statistics.median(each[name] for each in times) for name in times[0]}
        total, peer = medians.pop("total"), statistics.median(bare[fault])
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in medians.items() if seconds >= 0.05)
        every = ", ".join(f"{each['total']:.1f}" for each in times)
        print(
            f"{fault} killed: {total:.1f} s to the next trained step (aim {AIMS[fault]:.0f}; {every});"
            f" bare Ray {peer:.1f} s, ratio {total / peer:.2f}\n  {parts}"
        )


if __name__ == "__main__":
    main()
