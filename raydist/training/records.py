"""The records of a run in metrics.jsonl, as its hook on rank 0 makes them, and the figures in them."""

from __future__ import annotations

import contextlib
import itertools
import platform
from collections.abc import Collection
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from raydist.folder import RunFolder
from raydist.model.precision import uses_tf32
from raydist.sealed import opened
from raydist.training.checkpoint import Commit
from raydist.training.hooks import Hook, StepResult
from raydist.training.peak import peak_flops

if TYPE_CHECKING:
    from raydist.training.loop import Attempt


VERSIONS_OF = ("raydist", "torch", "transformers", "ray", "peft", "bitsandbytes", "deepspeed")


class Records(Hook):
    """Writes what happened. Seconds are of steps alone, without compiling, evaluations and checkpoints."""

    def __init__(self) -> None:
        self._counted_seconds = 0.0
        self._before: dict[str, float] = {}
        self._wait_seconds, self._flops, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def on_start(self, attempt: Attempt) -> None:
        starts = attempt.plan.starts
        self._before = losses_at_start(attempt.folder, starts) if attempt.world.is_main else {}
        attempt.record(
            "resume" if attempt.resumed else "start",
            samples=attempt.samples,
            steps=attempt.plan.steps,
            world_size=attempt.world.world_size,
            micro_batch_size=attempt.plan.micro_batch_size,
            n_parameters=attempt.n_parameters,
            n_trainable=attempt.n_trainable,
            why=attempt.spec.why,
            seconds=attempt.phases.so_far(),
            device=str(attempt.world.device.type),
            threads=torch.get_num_threads(),
            device_name=_device_name(attempt.world.device),
            mixed_precision=attempt.job.train.mixed_precision,
            tf32=uses_tf32(),
            versions=_versions(),
            **attempt.fitted.to_json(),
            **(attempt.micro_batch_found.to_json() if attempt.micro_batch_found else {}),
        )
        before, now = attempt.spec.workers_before, attempt.world.world_size
        if before not in (None, now):
            attempt.record("resize", **{"from": before, "to": now}, why=attempt.spec.why)
        if not attempt.data.feed.complete:
            attempt.record(
                "incident", what="the token logs are still growing; evaluations begin when they are whole"
            )
        for empty in (data.name for data in attempt.data.eval_sets if not data.n_documents):
            attempt.record("incident", what=f"{empty} has no held-out document, so it is not evaluated")

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self._steps, self._tokens = self._steps + 1, self._tokens + result.counts.tokens
        self._wait_seconds, self._flops = self._wait_seconds + result.wait_seconds, self._flops + result.flops
        scale, skipped = attempt.strategy.loss_scale, attempt.position.skipped
        if scale is not None or attempt.job.guards.mode == "on":
            result.figures.update(skipped_steps=skipped.steps, skipped_samples=skipped.samples)
        if scale is not None:
            result.figures.update(loss_scale=scale.scale)
            if scale.bad:
                attempt.record(
                    "incident",
                    what=f"step {attempt.step} was skipped: its gradients left the range of fp16;"
                    f" the loss scale is {scale.scale:g} now",
                )
        if result.loss is not None:
            self._record_step(attempt, result)
        self._record_stage(attempt)

    def on_evaluate(self, attempt: Attempt, evals: dict[str, dict[str, Any]]) -> None:
        job = attempt.job
        replayed = {n for n, source in {**job.eval.sources, **job.corpus.sources}.items() if source.replay}
        for source, values in evals.items():
            first = attempt.step == 0 or (source not in self._before and attempt.step in attempt.plan.starts)
            if first:
                self._before[source] = values["eval_loss"]
            elif replayed and (before := self._before.get(source)) is not None:
                worse = values["eval_loss"] - before
                values = {**values, **({"forgetting": worse} if source in replayed else {"gain": -worse})}
            attempt.record("eval", **values)

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        attempt.record("commit", step=commit.step, samples=commit.samples, ledger=commit.ledger)

    def _record_step(self, attempt: Attempt, result: StepResult) -> None:
        """Means per step since the last record, rates of all ranks together. docs/design.md defines them."""
        counted = attempt.phases.of("first_step", "steps")
        seconds, self._counted_seconds = max(counted - self._counted_seconds, 1e-9), counted
        flops_per_second = attempt.world.sum_floats([self._flops])[0] / seconds
        peak = peak_flops(attempt.world.device)
        attempt.record(
            "train",
            loss=result.loss,
            tokens_seen=attempt.seen.tokens,
            samples=attempt.samples,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_second=self._tokens / seconds,
            flops_per_second=flops_per_second,
            data_wait_seconds=self._wait_seconds / self._steps,
            step_seconds=seconds / self._steps,
            mfu=None if peak is None else flops_per_second / (peak * attempt.world.world_size),
            **({"workers": attempt.world.world_size} if attempt.spec.elastic else {}),
            **result.figures,
        )
        self._wait_seconds, self._flops, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def _record_stage(self, attempt: Attempt) -> None:
        """Once the samples of a stage are read, and another one follows."""
        ends = list(itertools.accumulate(stage.samples for stage in attempt.plan.stages[:-1]))
        if attempt.samples in ends:
            number = ends.index(attempt.samples) + 1
            block_size = attempt.plan.stages[number].block_size
            attempt.record("stage", number=number + 1, block_size=block_size)


def losses_at_start(folder: RunFolder, starts: Collection[int] = (0,)) -> dict[str, float]:
    """Of the first evaluation of each source, in nats, where that is at the start of a segment.

    starts: the first step of each segment.
    """
    found: dict[str, tuple[int, float]] = {}
    for line in folder.metrics_file.read_bytes().split(b"\n") if folder.metrics_file.exists() else ():
        with contextlib.suppress(ValueError):  # a torn or damaged line
            record = opened(line)
            if record.get("kind") == "eval" and record.get("step") in starts:
                step = record["step"]
                if step <= found.get(record["source"], (step,))[0]:
                    found[record["source"]] = step, record["eval_loss"]
    return {source: loss for source, (_, loss) in found.items()}


def _device_name(device: torch.device) -> str:
    """Of the card; of the kind of processor on CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of Python, and of each package in VERSIONS_OF that is installed here."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
