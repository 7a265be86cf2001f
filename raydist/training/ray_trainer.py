"""One attempt at training on a Ray cluster: the loop inside Ray Train's workers.

Each attempt is a Ray Train run of its own, <run>/ray/attempt-N: Ray's snapshot of earlier ones can
be torn, and the run's own COMMIT.json files are the authority in any case.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint
from ray.train.torch import TorchConfig, get_device
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raydist import files
from raydist.errors import ClusterError, RaydistError, TrainingError, WorkerLost
from raydist.training.checkpoint import Commit
from raydist.training.loop import TrainResult, train
from raydist.training.spec import TrainSpec
from raydist.training.world import backend_of

COLLECTIVE_TIMEOUT_SECONDS = 300


def run_attempt(spec: TrainSpec) -> TrainResult:
    """Train `spec` on the Ray that this process is connected to, until it ends or stops.

    Raises WorkerLost when a worker process or its node went away, so that another attempt can go on
    from the last checkpoint; ClusterError when the workers could not be started; what the training
    function raised, if it is a RaydistError, else TrainingError with the worker's traceback.
    """
    scaling = _scaling(spec)
    backend = backend_of(torch.device("cuda" if scaling.use_gpu else "cpu"))
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"attempt-{spec.attempt}",
            storage_path=str(spec.run / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.job.checkpoint.save_total_limit),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        fitted = trainer.fit()
    except TrainingFailedError as error:
        raise _explain(error, spec) from error
    result: TrainResult = fitted.return_value  # type: ignore[attr-defined]
    return result


def _scaling(spec: TrainSpec) -> ScalingConfig:
    asked = spec.job.scaling
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = gpus >= spec.plan.world_size if asked.use_gpu == "auto" else asked.use_gpu
    return ScalingConfig(
        num_workers=spec.plan.world_size,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": asked.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
    )


# --- on the worker -------------------------------------------------------------------------------


def _train_on_worker(config: dict[str, Any]) -> TrainResult:
    spec: TrainSpec = config["spec"]
    context, device = ray.train.get_context(), get_device()
    torch.set_num_threads(spec.job.scaling.cpus_per_worker)
    try:
        return train(
            spec,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            device=device if isinstance(device, torch.device) else device[0],
            on_commit=_report,
        )
    except RaydistError:
        raise
    except Exception as error:  # whole, since Ray cuts a traceback to 1,000 characters
        raise TrainingError(
            f"rank {context.get_world_rank()}: {type(error).__name__}: {error}", why=traceback.format_exc()
        ) from error


def _report(commit: Commit) -> None:
    """Tell Ray Train of a commit, on all ranks alike: a pointer, since the state lies in the run's folder."""
    metrics = {"step": commit.step, "samples": commit.samples, "eval_loss": commit.eval_loss}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        files.write_json(Path(folder) / "pointer.json", {"checkpoint": str(commit.path), "step": commit.step})
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


# --- what went wrong -----------------------------------------------------------------------------


def _explain(error: TrainingFailedError, spec: TrainSpec) -> RaydistError:
    if isinstance(error, ControllerError):
        return _explain_controller(error, spec)
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    raised = [failure for failure in failures if not _is_loss(failure)]
    own = next((failure for failure in raised if isinstance(failure, RaydistError)), None)
    if own is not None:
        return own
    if raised:
        return TrainingError(f"a worker failed: {raised[0]}", where=_logs(spec), why=str(error))
    return WorkerLost(_first_line(failures) or "a worker was lost", where=_logs(spec))


def _is_loss(failure: Exception) -> bool:
    """The process or its node is gone, or it could not reach one that is."""
    ray_own = type(failure).__module__.startswith("ray.train.v2._internal")  # a failed health check
    return ray_own or isinstance(failure, WorkerLost | RayActorError)


def _explain_controller(error: ControllerError, spec: TrainSpec) -> RaydistError:
    cause = error.controller_failure
    if "Timeout" not in type(cause).__name__:
        return WorkerLost(f"the workers could not be started: {_first_line([cause])}", where=_logs(spec))
    asked = f"{spec.plan.world_size} workers of {spec.job.scaling.cpus_per_worker} CPUs"
    return ClusterError(
        f"the cluster has no room for {asked}",
        where=f"it has {ray.available_resources()} free of {ray.cluster_resources()}",
        why=_first_line([cause]),
        fix="wait for other jobs, add nodes, or lower scaling.num_workers",
    )


def _first_line(failures: Iterable[Exception]) -> str:
    return next((str(failure).strip().splitlines()[0] for failure in failures if str(failure).strip()), "")


def _logs(spec: TrainSpec) -> str:
    return str(spec.run / "ray" / f"attempt-{spec.attempt}")
