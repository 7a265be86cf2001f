"""Steps that guards refuse, on two ranks under each strategy: three in a row, then back to a checkpoint.

    step     1  2  3  4        5        6                    7  8  9
             .  .  .  skipped  skipped  back to that of 2    .  .  .

What was found goes to FOLDER/<case>/found-<rank>.json, to be judged by the tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open

from raydist.files import write_json
from raydist.model import head
from raydist.model.head import WORTH_ELEMENTS
from raydist.parallel.loss_scale import LossScale
from raydist.parallel.world import World
from raydist.training.hooks import Hook, StepResult, StopOnRequest
from raydist.training.loop import Attempt, train
from tests.train_parts import make_spec
from tests.unit.parallel.half import FITS, past_the_refusal
from tests.unit.parallel.matrix import STRATEGIES, name_of, told

CASES = [
    *((name, "skipping", "fp32") for name in STRATEGIES),
    ("fsdp", "chunked", "fp32"),
    ("zero-3", "chunked", "fp32"),
    *((name, "skipping", "fp16") for name in ("ddp", "fsdp", "zero-2", "zero-3")),
]
"""chunked: logits are never made whole, as with a large vocabulary. fp16 is last: after it DeepSpeed scales
the gradients of the next engine in the process, too.
"""
STEPS = 9


def windows(loss: float, norm: float) -> dict[str, Any]:
    return {"losses": [loss] * 20, "norms": [norm] * 20, "block_size": 32}


class Watch(Hook):
    """Changes what a guard compares with, as if other steps had come before; looks at the state of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.found: list[dict[str, Any]] = []

    def on_start(self, attempt: Attempt) -> None:
        attempt.skips.guard.load_windows(windows(100.0, 100.0))

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step == 3:
            attempt.skips.guard.load_windows(windows(0.01, 0.01))
        world, folder = attempt.world, self._folder / f"state-{attempt.step}"
        folder.mkdir(parents=True, exist_ok=True)
        world.barrier()
        attempt.strategy.save(folder).wait()
        world.barrier()
        self.found.append(
            {
                "taken": result.taken,
                "samples": attempt.samples,
                "skipped": [attempt.position.skipped.steps, attempt.position.skipped.ranges],
                "tokens": attempt.seen.tokens,
                "in_a_row": attempt.skips.guard.in_a_row,
                "optimizer_steps": steps_of(attempt.strategy),
                "state": digest_of(folder),
            }
        )


def steps_of(strategy: Any) -> list[int]:
    """How often the optimizer itself believes that it stepped."""
    optimizer = strategy.engine.optimizer.optimizer if hasattr(strategy, "engine") else strategy.optimizer
    return sorted({int(state["step"]) for state in optimizer.state.values() if "step" in state})


def digest_of(folder: Path) -> str:
    """Of all weights and optimizer state, in whatever order they are stored."""
    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            parts += [(path.name, key, file.get_tensor(key).numpy().tobytes()) for key in file.keys()]  # noqa: SIM118
    digest = xxhash.xxh3_128()
    for name, key, content in sorted(parts):
        digest.update(f"{name} {key} ".encode() + content)
    return digest.hexdigest()


def run_skipping(folder: Path, cases: Sequence[tuple[str, str, str]] = CASES) -> None:
    """One rank of two; the last half of `on_ranks` finds nothing to do."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return
    past_the_refusal(LossScale, FITS)
    dist.init_process_group("gloo")
    for case in cases:
        with told(folder / name_of(case)):
            skip(case, folder, rank)
    dist.destroy_process_group()


def skip(case: tuple[str, str, str], folder: Path, rank: int) -> None:
    strategy, kind, precision = case
    head.WORTH_ELEMENTS = 0 if kind == "chunked" else WORTH_ELEMENTS
    spec = make_spec(
        folder,
        world_size=2,
        run=f"{name_of(case)}/run",
        strategy=STRATEGIES[strategy],
        train={"max_steps": 30, "global_batch_size": 5, "mixed_precision": precision, "logging_steps": 1},
        checkpoint={"save_steps": 2, "save_total_limit": 1},
        eval={"eval_steps": 100, "max_tokens": 400},
        guards={"mode": "on", "window": 20, "max_skipped": 3},
    )
    asked, watch = iter([False] * (STEPS - 1) + [True]), Watch(folder / name_of(case))
    train(spec, World(rank, 2), hooks=[StopOnRequest(lambda: next(asked)), watch])
    write_json(folder / name_of(case) / f"found-{rank}.json", watch.found)
