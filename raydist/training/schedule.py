"""The learning rate as a pure function of the step: a resume needs no state."""

from __future__ import annotations

import math

from raydist.job.plan import Plan
from raydist.job.schema import Train


def planned_rate(step: int, plan: Plan, train: Train) -> float:
    """The rate of optimizer step `step`, which counts from 0: by the schedule of its segment.

    An extension that is not re-warmed stays at the rate that the schedule before it reached.
    """
    segment = plan.segment(step)
    if segment.rewarm:
        return learning_rate(step - segment.first_step, segment.steps, train)
    return train.lr * (1.0 if train.scheduler == "constant" else train.min_lr_ratio)


def learning_rate(step: int, steps: int, train: Train) -> float:
    """The rate of optimizer step `step`, which counts from 0, in a segment of `steps`.

    A linear warm-up, whose first step is not at rate zero, then a decay that reaches lr * min_lr_ratio
    at `steps`.
    """
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return train.lr * (
        train.min_lr_ratio + (1 - train.min_lr_ratio) * _remaining(progress, step, steps, train)
    )


def _remaining(progress: float, step: int, steps: int, train: Train) -> float:
    """The share left of the way down from lr to lr * min_lr_ratio. progress: 0 to 1 after the warm-up."""
    match train.scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            decay = math.ceil(train.decay_ratio * steps)
            return min(1.0, (steps - step) / decay)
