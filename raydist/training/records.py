"""The records of a run in metrics.jsonl, as its hook on rank 0 makes them, and the figures in them."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import torch

from raydist.training.checkpoint import Commit
from raydist.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from raydist.training.loop import Attempt

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense tensor-core peak by a part of the device's name; longer names stand before those they contain."""


class Records(Hook):
    """Writes what happened. Seconds are of training alone, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._seconds, self._wait_seconds = 0.0, 0.0
        self._steps, self._tokens = 0, 0

    def on_start(self, attempt: Attempt) -> None:
        attempt.record(
            "resume" if attempt.resumed else "start",
            samples=attempt.samples,
            steps=attempt.plan.steps,
            world_size=attempt.world.world_size,
            micro_batch_size=attempt.plan.micro_batch_size,
            n_parameters=attempt.n_parameters,
            n_trainable=attempt.n_trainable,
            device=str(attempt.world.device.type),
            **attempt.fitted.to_json(),
        )
        if not attempt.data.feed.complete:
            attempt.record(
                "incident", what="the token logs are still growing; evaluations begin when they are whole"
            )
        for empty in (data.name for data in attempt.data.eval_sets if not data.n_documents):
            attempt.record("incident", what=f"{empty} has no held-out document, so it is not evaluated")
        self._mark = time.perf_counter()

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._steps, self._tokens = self._steps + 1, self._tokens + result.counts.tokens
        self._wait_seconds += result.wait_seconds
        if result.loss is not None:
            self._record_step(attempt, result)
        self._record_stage(attempt)

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        for values in evals.values():
            attempt.record("eval", **values)
        self._mark = time.perf_counter()

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        attempt.record("commit", step=commit.step, samples=commit.samples, ledger=commit.ledger)
        self._mark = time.perf_counter()

    def _record_step(self, attempt: Attempt, result: StepResult) -> None:
        """Means per step since the last record; document tokens per second, over all ranks."""
        seconds = max(self._seconds, 1e-9)
        tokens_per_second = self._tokens / seconds
        attempt.record(
            "train",
            loss=result.loss,
            tokens_seen=attempt.seen.tokens,
            samples=attempt.samples,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_second=tokens_per_second,
            data_wait_seconds=self._wait_seconds / self._steps,
            step_seconds=seconds / self._steps,
            mfu=mfu(tokens_per_second, attempt.n_parameters, attempt.world.world_size, attempt.world.device),
            **result.figures,
        )
        self._seconds, self._wait_seconds, self._steps, self._tokens = 0.0, 0.0, 0, 0
        self._mark = time.perf_counter()

    def _record_stage(self, attempt: Attempt) -> None:
        """Once the samples of a stage are read, and another one follows."""
        ends = list(itertools.accumulate(stage.samples for stage in attempt.plan.stages[:-1]))
        if attempt.samples in ends:
            number = ends.index(attempt.samples) + 1
            block_size = attempt.plan.stages[number].block_size
            attempt.record("stage", number=number + 1, block_size=block_size)


def mfu(tokens_per_second: float, n_parameters: int, world_size: int, device: torch.device) -> float | None:
    """6 N tokens/s over the peak of all devices; None where the peak is not known, as on CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
    return None if peak is None else 6 * n_parameters * tokens_per_second / (peak * world_size)
