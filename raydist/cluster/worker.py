"""One rank of an attempt, in a worker of Ray Train."""

from __future__ import annotations

import tempfile
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device

from raydist import files
from raydist.errors import RaydistError, TrainingError
from raydist.folder import RunFolder
from raydist.parallel.world import World
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit
from raydist.training.hooks import Hook
from raydist.training.loop import Attempt, train


def train_on_worker(spec: AttemptSpec, import_seconds: float) -> dict[str, Any]:
    """The TrainResult as plain values: Ray's controller reads it, and need not import the training for it."""
    spec = spec.imported(import_seconds)
    context, device = ray.train.get_context(), get_device()
    if context.get_world_rank() == 0:
        _note_group(spec)
    try:
        world = World(
            context.get_world_rank(),
            context.get_world_size(),
            context.get_local_rank(),
            device if isinstance(device, torch.device) else device[0],
        )
        return asdict(train(spec, world, hooks=[ReportToRay()]))
    except RaydistError:
        raise
    except Exception as error:  # whole: Ray cuts a traceback to 1,000 characters
        raise TrainingError(
            f"rank {context.get_world_rank()}: {type(error).__name__}: {error}", why=traceback.format_exc()
        ) from error


def _note_group(spec: AttemptSpec) -> None:
    """Which placement group the workers are in: where the controller is lost, the driver removes it."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        with suppress(OSError):
            files.write_text(RunFolder(spec.run).placement_group(spec.attempt), group.id.hex())


class ReportToRay(Hook):
    """Reports each commit to Ray Train: a pointer, since the state lies in the run's folder."""

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        metrics = {"step": commit.step, "samples": commit.samples, "eval_loss": commit.eval_loss}
        if not attempt.world.is_main:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"checkpoint": str(commit.path), "step": commit.step}
            files.write_json(Path(folder) / "pointer.json", pointer)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
