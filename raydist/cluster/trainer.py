"""One attempt at training on a Ray cluster: the loop inside Ray Train's workers.

Each attempt is a Ray Train run of its own, <run>/ray/attempt-N: Ray's snapshot of earlier ones can
be torn, and the run's own COMMIT.json files are the authority in any case.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from raydist import files
from raydist.cluster import network
from raydist.cluster.groups import remove_groups
from raydist.cluster.network import BetweenHosts
from raydist.cluster.unstored import ray_storage
from raydist.errors import ClusterError, RaydistError, Stopped, TrainingError, WorkerLost, first_line
from raydist.folder import RunFolder
from raydist.own_ray import is_embedded
from raydist.training.attempt_spec import AttemptSpec, TrainResult

COLLECTIVE_TIMEOUT_SECONDS = 300
NODES_BACK_SECONDS = 600
"""How long a run that had room for its workers once waits for nodes to come back."""


def run_attempt(
    spec: AttemptSpec, say: Callable[[str], None] = lambda text: None, *, patient: bool = True
) -> TrainResult:
    """Train `spec` on the Ray that this process is connected to, until it ends or stops.

    Raises WorkerLost when a worker process, its node or Ray Train's controller went away, so that another
    attempt can go on from the last checkpoint; ClusterError when there was no room for the workers, in a
    later attempt only after a wait for nodes, which `say` announces, and which one that is not patient leaves
    out; what the training function raised, if it is a RaydistError, else TrainingError with the worker's
    traceback.
    """
    waits = patient and spec.attempt > 1
    deadline = time.monotonic() + (NODES_BACK_SECONDS if waits else 0)
    if waits and (missing := _missing(spec)):
        say(f"waiting up to {NODES_BACK_SECONDS // 60} minutes for nodes: {missing}")
    while True:
        try:
            return _fit(spec)
        except ClusterError:
            if time.monotonic() >= deadline:
                raise
            if RunFolder(spec.run).stop_asked():
                raise Stopped("stopped while waiting for nodes", where=str(spec.run)) from None


def _fit(spec: AttemptSpec) -> TrainResult:
    scaling = _scaling(spec)
    group = BetweenHosts("nccl" if scaling.use_gpu else "gloo", COLLECTIVE_TIMEOUT_SECONDS)
    trainer = Trainer(
        _train_on_worker,
        train_loop_config={"spec": spec},
        torch_config=group,  # type: ignore[arg-type]
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"attempt-{spec.attempt}",
            **ray_storage(RunFolder(spec.run)),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.job.checkpoint.save_total_limit),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        fitted = trainer.fit()
    except TrainingFailedError as error:
        # Its frames hold the controller, and that one the CPUs of workers that did not all start.
        traceback.clear_frames(error.__traceback__)
        raise _explain(error, spec) from error
    except RayError as error:
        remove_groups(RunFolder(spec.run))
        raise _explain_ray(error, spec) from error
    return TrainResult(**fitted.return_value)  # type: ignore[attr-defined]


class Trainer(TorchTrainer):
    """Without actors that nobody needs here: each takes 200 MB, and CPU seconds at every attempt's start.

    One splits Ray data sets among the workers, but ours read token logs. The other frees the workers' CPUs
    where the controller and the driver are lost; an embedded Ray is lost with its driver. The method is Ray's
    own and not public: in a release that does without it this one is never called.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        unused = {"DatasetsCallback", *(("PlacementGroupCleanerCallback",) if is_embedded() else ())}
        return [each for each in callbacks if type(each).__name__ not in unused]


def _scaling(spec: AttemptSpec) -> ScalingConfig:
    asked = spec.job.scaling
    use_gpu = asked.on_gpus(ray.cluster_resources().get("GPU", 0))
    return ScalingConfig(
        num_workers=spec.plan.world_size,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": spec.cpus, **({"GPU": 1} if use_gpu else {})},
    )


def _missing(spec: AttemptSpec) -> str:
    """What the cluster lacks to hold all workers, were it idle; empty if nothing."""
    count, there = spec.plan.world_size, ray.cluster_resources()
    asked = {"CPU": count * spec.cpus, "GPU": count * bool(_scaling(spec).use_gpu)}
    short = [name for name, least in asked.items() if there.get(name, 0) < least]
    return ", ".join(f"{there.get(name, 0):g} of {asked[name]} {name}s are there" for name in short)


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """In a worker. Only there is the training imported; driver and controller need not wait for it."""
    from raydist.cluster.worker import train_on_worker

    return train_on_worker(config["spec"], import_seconds=network.import_seconds)


# --- what went wrong -----------------------------------------------------------------------------


def _explain(error: TrainingFailedError, spec: AttemptSpec) -> RaydistError:
    if isinstance(error, ControllerError):
        return _explain_controller(error, spec)
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    if killed := next((failure for failure in failures if _is_for_memory(failure)), None):
        return _out_of_memory(spec, killed, "on a worker's node: Ray ended the worker")
    raised = [failure for failure in failures if not _is_loss(failure)]
    own = next((failure for failure in raised if isinstance(failure, RaydistError)), None)
    if own is not None:
        return own
    if raised:
        return TrainingError(f"a worker failed: {first_line(raised[0])}", where=_whole(error, spec))
    return WorkerLost(_first_line(failures) or "a worker was lost", where=_whole(error, spec))


def _explain_ray(error: RayError, spec: AttemptSpec) -> RaydistError:
    """What Ray raises by itself, without Ray Train's wrapping: the controller of the attempt is gone."""
    if isinstance(error, OutOfMemoryError):
        return _out_of_memory(spec, error, "on the driver's node: Ray ended the training's controller")
    return WorkerLost(
        f"the process that controls the workers was lost: {_died(error)}", where=_whole(error, spec)
    )


def _out_of_memory(spec: AttemptSpec, error: Exception, where: str) -> RaydistError:
    from raydist.training.room import Room

    return Room(spec, None).out_of_memory(error, where)


def _died(error: RayError) -> str:
    """Of Ray's long text the sentence that says how a process ended."""
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]*)", str(error))
    return f"{found[1]}, {found[2]}" if found else first_line(error)


def _whole(error: Exception, spec: AttemptSpec) -> str:
    """Where Ray's own text about the error is, in full."""
    file = RunFolder(spec.run).attempt(spec.attempt) / "error.txt"
    with suppress(OSError):
        files.write_text(file, "".join(traceback.format_exception(error)))
        return str(file)
    return _logs(spec)


def _is_loss(failure: Exception) -> bool:
    """The process or its node is gone, or it could not reach one that is."""
    ray_own = type(failure).__module__.startswith("ray.train.v2._internal")  # a failed health check
    return ray_own or isinstance(failure, WorkerLost | RayActorError)


def _is_for_memory(failure: Exception) -> bool:
    """Or a health check that failed of it."""
    return isinstance(getattr(failure, "health_check_failure", failure), OutOfMemoryError)


def _explain_controller(error: ControllerError, spec: AttemptSpec) -> RaydistError:
    cause = error.controller_failure
    if "Timeout" not in type(cause).__name__:
        return WorkerLost(f"the workers could not be started: {_first_line([cause])}", where=_logs(spec))
    asked = f"{spec.plan.world_size} workers of {spec.cpus} CPUs"
    return ClusterError(
        f"the cluster has no room for {asked}",
        where=f"it has {ray.available_resources()} free of {ray.cluster_resources()}",
        why=_first_line([cause]),
        fix="wait for other jobs, add nodes, or lower scaling.num_workers",
    )


def _first_line(failures: Iterable[Exception]) -> str:
    return next((str(failure).strip().splitlines()[0] for failure in failures if str(failure).strip()), "")


def _logs(spec: AttemptSpec) -> str:
    return str(RunFolder(spec.run).attempt(spec.attempt))
