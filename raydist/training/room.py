"""What a worker needs by the estimate and what its device has: what does not fit, and what would."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import psutil
import torch

from raydist.errors import JobError, OutOfMemory, first_line
from raydist.job.plan import Plan, make_plan
from raydist.job.schema import Job
from raydist.job.values import with_parameters
from raydist.model.build import Sizes, load_config, load_tokenizer, model_sizes
from raydist.parallel.footprint import FIXED, on_device, worker_memory
from raydist.training.attempt_spec import AttemptSpec

HEADROOM = 0.92
"""Share of a device's memory that is planned with: the allocator's gaps and libraries take the rest."""
LEAST_BLOCK = 8


class Room:
    """Of one worker. device: its own; None where this process is not the worker.

    plan: of the attempt; whoever changes the attempt's micro batches changes it here too.
    """

    def __init__(self, spec: AttemptSpec, device: torch.device | None) -> None:
        self.job, self.plan, self.device, self._tokenizer = spec.job, spec.plan, device, spec.tokenizer

    @cached_property
    def sizes(self) -> Sizes:
        return self._sizes(self.job)

    @cached_property
    def memory(self) -> int | None:
        """Bytes of the device, or of this host, which its workers share; None where they are not known."""
        if self.device is None:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[1])
        return int(psutil.virtual_memory().total)

    def parts(self, plan: Plan) -> dict[str, int]:
        """Bytes by part, by the estimate."""
        return worker_memory(self.job, plan, self.sizes)

    def needed(self, plan: Plan) -> int:
        """Bytes on the device, by the estimate."""
        return on_device(self.parts(plan))

    def require_fixed_parts(self) -> None:
        """Raises OutOfMemory where a GPU cannot hold what is there before the first token.

        Before the model is loaded. DeepSpeed's own keys may move parts to the host: such jobs are left alone.
        """
        if (
            self.memory is None
            or self.device is None
            or self.device.type != "cuda"
            or self.job.strategy.config
        ):
            return
        parts = self.parts(self.plan)
        fixed = sum(parts.get(name, 0) for name in FIXED)
        if fixed > self.memory:
            raise OutOfMemory(
                f"a worker needs {_size(fixed)} before its first token, and its GPU has {_size(self.memory)}",
                why=self._estimated(),
                fix=self._fix(),
            )

    def out_of_memory(self, cause: Exception, what: str = "") -> OutOfMemory:
        """The error for a worker that ran out of memory, with what would fit. what: else its micro batch."""
        text = f"out of memory {what or f'with micro batches of {self.plan.micro_batches} sequences'}"
        try:
            return OutOfMemory(text, why=f"{first_line(cause)}; {self._estimated()}", fix=self._fix())
        except Exception:  # noqa: BLE001 - whatever it is, the error that is explained here matters more
            return OutOfMemory(text, why=first_line(cause), fix=FIX)

    # --- the text ----------------------------------------------------------------------------------

    def _estimated(self) -> str:
        parts = self.parts(self.plan)
        listed = ", ".join(
            f"{name.replace('_', ' ')} {_size(n)}" for name, n in parts.items() if name != "total"
        )
        there = f" of {_size(self.memory)}" if self.memory is not None else ""
        return f"by the estimate a worker needs {_size(on_device(parts))}{there} ({listed})"

    def _fix(self) -> str:
        """Each change that needs less, with its total; those that fit are told apart where that is known."""
        now, limit = self.needed(self.plan), HEADROOM * (self.memory or 0)
        found = [(text, needed) for text, needed in self._changed() if needed < now]
        if (
            now <= limit or self.memory is None
        ):  # the estimate is too low, or there is nothing to compare it with
            return f"any of these needs less: {_listed(found)}" if found else FIX
        fitting = [(text, needed) for text, needed in found if needed <= limit]
        others = [(text, needed) for text, needed in found if needed > limit]
        texts = [f"any of these would fit: {_listed(fitting)}"] if fitting else []
        texts += [f"not enough by itself: {_listed(others)}"] if others else []
        return "; ".join(texts) or FIX

    def _changed(self) -> Iterator[tuple[str, int]]:
        """Changes of the job as they are written in it, each with the bytes that a worker needs then."""
        values = self.job.model_dump(mode="json")
        for change in changes(self.job, self.plan.world_size):
            try:
                job = Job.model_validate(with_parameters(values, change))
            except JobError:  # a rule does not allow it for this job
                continue
            same = (job.adapter, job.quantization) == (self.job.adapter, self.job.quantization)
            workers = change.get("scaling.num_workers", self.plan.world_size)
            tokens = self.plan.micro_batch_tokens * max(job.block_sizes) // max(self.job.block_sizes)
            tokens = 1 if "train.micro_batch_size" in change else tokens
            plan = make_plan(job, workers, self.plan.samples_per_epoch, tokens)
            sizes = self.sizes if same else self._sizes(job)
            text = ", ".join(f"{key}: {_yaml(value)}" for key, value in change.items())
            yield text, on_device(worker_memory(job, plan, sizes))

    def _sizes(self, job: Job) -> Sizes:
        return model_sizes(load_config(job, len(load_tokenizer(self._tokenizer))), job)


FIX = (
    "take a smaller micro batch (train.micro_batch_size: auto finds one), a smaller block size,"
    " gradient_checkpointing, an adapter on a quantized base, or a strategy that shards"
)


def changes(job: Job, workers: int) -> Iterator[dict[str, Any]]:
    """What a job could change to need less memory on each worker: dotted keys and their values."""
    sharded = job.strategy.shards_weights
    if job.train.micro_batch_size not in ("auto", 1):
        yield {"train.micro_batch_size": "auto"}
    if job.train.gradient_checkpointing is not True:
        yield {"train.gradient_checkpointing": True}
    if job.adapter is None and job.model.base is not None:
        yield {"adapter": {"method": "lora"}}
    if job.adapter is not None and job.quantization is None:
        yield {"quantization": "int4"}
    if (half := max(job.block_sizes) // 2) >= LEAST_BLOCK:
        stages = [{**s.model_dump(), "block_size": min(s.block_size, half)} for s in job.stages]
        yield {"stages": stages} if stages else {"packing.block_size": half}
    if workers > 1 and not sharded:
        yield {"strategy": {"name": "fsdp"}}
    yield {**({} if sharded else {"strategy": {"name": "fsdp"}}), "scaling.num_workers": 2 * workers}


def _listed(changes: list[tuple[str, int]]) -> str:
    return ", or ".join(f"{text} ({_size(needed)})" for text, needed in changes)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(n_bytes: float) -> str:
    unit, name = (1e9, "GB") if n_bytes >= 1e9 else (1e6, "MB")
    return f"{n_bytes / unit:.3g} {name}"
