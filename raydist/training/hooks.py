"""What happens around training, and at which moments of it.

    start ─▶ ( step ─▶ evaluate? ─▶ commit? )* ─▶ end
               │
               the loop calls every hook at each of these, on every rank, in the order of the list

The loop trains; whatever else a run does is a hook: records, stop requests, keeping the best model, memory
figures, a profile, and what a user names in `train.hooks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from raydist.errors import JobError
from raydist.job.functions import import_function
from raydist.training.checkpoint import Commit, Counts, best
from raydist.training.commit_request import asked
from raydist.training.memory import peak_resident

if TYPE_CHECKING:
    from raydist.training.loop import Attempt


@dataclass(frozen=True)
class StepResult:
    """A step. The attempt's step and samples are already those after it.

    loss: mean over the labels of the global batch, in nats; None but at the steps that are recorded (every
    `logging_steps`, and the attempt's first), since reading it makes a GPU wait.  grad_norm: before clipping;
    None as the loss is, and not finite where fp16 skipped the step.  learning_rate: of this step.
    taken: whether it changed the weights; fp16 and guards skip steps.
    counts: inputs of the global batch.  wait_seconds: for its data, here.
    flops: what this rank's part of the batch takes to compute (raydist/model/work.py).
    figures: what else the record of the step holds; hooks may add numbers by names of their own.
    """

    loss: float | None
    grad_norm: float | None
    learning_rate: float
    counts: Counts
    wait_seconds: float
    flops: float = 0.0
    taken: bool = True
    figures: dict[str, Any] = field(default_factory=dict)


class Hook:
    """Override what you need. Every method is called on every rank alike, so collectives are allowed.

    `attempt` says where the run is (`step`, `samples`, `seen`, `plan`, `job`, `world`, `folder`, `strategy`)
    and takes requests: `request_stop()`, `request_commit()`, `record(kind, **values)`.
    What a hook raises ends the attempt.
    """

    def on_start(self, attempt: Attempt) -> None:
        """The model is built and resumed; nothing of this attempt is trained or evaluated yet."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        """After each optimizer step, before an evaluation or a checkpoint of it."""

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        """After an evaluation. evals: by source, with eval_loss in nats, perplexity, bits_per_byte."""

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        """A checkpoint counts from now on."""

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        """After the last step and its commit, before model/ can be seen; not after an error.

        The weights of model/ are read by then."""


def load_hooks(named: Sequence[str]) -> list[Hook]:
    """An object of each class in `train.hooks`. Raises JobError for one that cannot be used."""
    return [_load_hook(path, f"train.hooks[{index}]") for index, path in enumerate(named)]


def _load_hook(path: str, where: str) -> Hook:
    kind = import_function(path, where)
    if not (isinstance(kind, type) and issubclass(kind, Hook)):
        raise JobError(
            f"{path} is not a hook",
            where=where,
            why="the loop calls the methods of raydist.Hook",
            fix="make it a class that extends raydist.Hook and overrides what it needs",
        )
    try:
        return kind()
    except TypeError as error:
        raise JobError(
            f"{path} cannot be made without arguments", where=where, why=str(error), fix="give them defaults"
        ) from error


# --- hooks of every run


class StopOnRequest(Hook):
    """Asks for a checkpoint and a clean end when there is a stop flag, or when `asked` says so on a rank."""

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self._asked = asked

    def on_start(self, attempt: Attempt) -> None:
        self._look(attempt)

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self._look(attempt)

    def _look(self, attempt: Attempt) -> None:
        flagged = attempt.world.is_main and attempt.folder.stop_asked()
        if not attempt.stopping and (flagged or self._asked()):
            attempt.request_stop()


class CommitOnRequest(Hook):
    """Asks for a checkpoint after the next step whenever `ask_for_commit` was called for this attempt."""

    def on_start(self, attempt: Attempt) -> None:
        self._heard = asked(attempt.folder, attempt.spec.attempt) if attempt.world.is_main else ""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if not attempt.world.is_main:
            return
        if (heard := asked(attempt.folder, attempt.spec.attempt)) != self._heard:
            self._heard = heard
            attempt.want_commit()


class ResizeOnRequest(Hook):
    """Asks for a checkpoint and an end where the driver has room for more workers."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        folder = attempt.folder
        asked = attempt.world.is_main and folder.look(folder.resize_flag(attempt.spec.attempt))
        if asked and not attempt.stopping:
            attempt.resizing = True
            attempt.request_stop()


class KeepBest(Hook):
    """With load_best_model_at_end: a better evaluation is committed also between the regular checkpoints."""

    def on_start(self, attempt: Attempt) -> None:
        found = best(attempt.folder) if attempt.world.is_main else None
        loss = found.eval_loss if found else None
        self._least = attempt.world.float_from_main(math.inf if loss is None else loss)

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        loss = attempt.position.eval_loss
        if attempt.step > 0 and attempt.step == attempt.plan.segment(attempt.step).first_step:
            # an extension has new sources, so its losses are not comparable with those before
            self._least = math.inf if loss is None else loss
        elif attempt.step > 0 and loss is not None and loss < self._least:
            self._least = loss
            attempt.request_commit()


class MemoryFigures(Hook):
    """memory_bytes: the peak so far: what is allocated on a GPU, this process's resident memory on CPU."""

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if result.loss is None:
            return
        device = attempt.world.device
        if device.type == "cuda":
            result.figures["memory_bytes"] = torch.cuda.max_memory_allocated(device)
        else:
            result.figures["memory_bytes"] = peak_resident()
