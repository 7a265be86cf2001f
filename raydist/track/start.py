"""The trackers that a job asks for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from raydist.errors import JobError
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.redact import is_redacted
from raydist.track.mlflow import Mlflow, name_of
from raydist.track.tensorboard import TensorBoard
from raydist.track.tracker import Sink, Tracker, Warn
from raydist.track.wandb import Wandb


def check_trackers(job: Job) -> None:
    """Raises JobError if a tracker's package is missing, or a secret of its address."""
    if isinstance(job.tracking.mlflow, str) and is_redacted(job.tracking.mlflow):
        raise JobError(
            f"a secret was taken out of {job.tracking.mlflow}",
            where="tracking.mlflow",
            why="raydist writes none into a run's folder, where this job comes from",
            fix="submit the job file that you wrote; better, set MLFLOW_TRACKING_USERNAME and _PASSWORD",
        )
    if not job.tracking.wandb:
        return
    try:
        metadata.version("wandb")  # not by importing it: a folder named wandb would do
    except metadata.PackageNotFoundError:
        raise JobError(
            "the package wandb is not installed",
            where="tracking.wandb",
            why="the job asks for tracking, so it does not run without",
            fix="pip install 'raydist[wandb]', or tracking.wandb: false",
        ) from None


def start_trackers(
    job: Job, run: RunFolder, on_warning: Warn, *, parent: str | None = None, poll_seconds: float = 2.0
) -> list[Tracker]:
    """Start a tracker for each service that the job asks for. parent: the id of the MLflow run above it."""
    tracking = job.tracking
    wanted: list[tuple[bool | str, Callable[[], Sink], str]] = [
        (tracking.mlflow, lambda: Mlflow(job, run, parent), name_of(job, run)),
        (tracking.tensorboard, lambda: TensorBoard(run), "TensorBoard"),
        (tracking.wandb, lambda: Wandb(job, run), "W&B"),
    ]
    return [Tracker(make, name, run, on_warning, poll_seconds) for on, make, name in wanted if on]
