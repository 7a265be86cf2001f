"""raydist's training loop against a bare PyTorch loop: same model, same batches, one process, in turn.

Prints each side's median seconds per step and their ratio. raydist's steps include everything that happens
between two steps: reading the batch, clipping, the log record. Both sides skip the first steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from raydist.api import prepare
from raydist.folder import RunFolder
from raydist.job.load import load_job
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.model.build import build_model
from raydist.model.loss import logits_of
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import Prepared
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train

CPU = torch.device("cpu")

JOB = Path(__file__).resolve().parent.parent / "jobs" / "quickstart.yaml"
WARM_UP_STEPS = 3
AIM = 1.02


def main() -> None:
    options = parse()
    logging.getLogger("raydist").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = load_job(options.job, overrides(options, Path(folder)))
        prepared = prepare(job)
        ours, theirs = [], []
        for turn in range(options.repeats):
            for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                side.append(raydist_steps(prepared, turn) if side is ours else bare_steps(prepared))
    tell(ours, theirs, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, default=JOB, help="a job file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="override a key of the job, as in raydist")
    parser.add_argument("--steps", type=int, default=30, help="steps a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    """One process, a length in steps, no evaluation and checkpoint between the first step and the last."""
    steps = options.steps
    fixed = {
        "name": "bench",
        "storage": folder,
        "train.max_tokens": "null",
        "train.epochs": "null",
        "train.max_steps": steps,
        "eval.eval_steps": steps,
        "eval.max_tokens": 1,
        "checkpoint.save_steps": steps,
        "scaling.num_workers": 1,
    }
    return [*options.set, *(f"{key}={value}" for key, value in fixed.items())]


def raydist_steps(prepared: Prepared, turn: int) -> list[float]:
    """Seconds of each step, with everything between two of them."""
    ends: list[float] = []

    class Clock(Hook):
        def on_step(self, attempt: Attempt, result: StepResult) -> None:
            ends.append(time.perf_counter())

    folder = RunFolder(Path(prepared.job.storage) / f"turn-{turn}")
    plan = make_plan(prepared.job, 1, prepared.feed().samples_per_epoch)
    train(attempt_spec(prepared, folder, plan, attempt=1), hooks=[Clock()])
    return differences(ends)


def bare_steps(prepared: Prepared) -> list[float]:
    """The least that trains the same model on the same batches, which are made before the clock runs."""
    job = prepared.job
    model = build_model(job, Path(prepared.tokenizer.folder), CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.lr, fused=True)
    starts = []
    for micro_batches, n_labels in batches(prepared):
        starts.append(time.perf_counter())
        for batch in micro_batches:
            logits = logits_of(model, batch)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss / n_labels).backward()
        if job.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return differences(starts)


def batches(prepared: Prepared) -> list[tuple[list[Any], int]]:
    job: Job = prepared.job
    plan = make_plan(job, 1, prepared.feed().samples_per_epoch)
    sizes = {"global_batch_size": plan.global_batch_size, "micro_batch_size": plan.micro_batch_size}
    steps: Iterator[Any] = prepared.feed().loader(0, 1, 0, plan.samples, **sizes)
    return [(step.micro_batches, step.n_labels) for step in steps]


def differences(starts: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(starts)][WARM_UP_STEPS:]


def tell(ours: list[list[float]], theirs: list[list[float]], *, as_json: bool) -> None:
    """The ratio is of the medians over all turns; that of each pair of turns shows the noise."""
    ratio = median(ours) / median(theirs)
    pairs = [statistics.median(a) / statistics.median(b) for a, b in zip(ours, theirs, strict=True)]
    result = {
        "raydist_seconds_per_step": round(median(ours), 5),
        "bare_seconds_per_step": round(median(theirs), 5),
        "ratio": round(ratio, 4),
        "ratio_of_each_turn": [round(pair, 4) for pair in pairs],
        "aim": AIM,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"training loop   raydist {median(ours):.4f} s/step   bare {median(theirs):.4f} s/step")
    turns = " ".join(f"{pair:.3f}" for pair in pairs)
    print(f"ratio {ratio:.3f} (aim: at most {AIM}); turn by turn {turns}")


def median(turns: list[list[float]]) -> float:
    return statistics.median(seconds for turn in turns for seconds in turn)


if __name__ == "__main__":
    main()
