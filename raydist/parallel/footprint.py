"""The memory that a worker needs, by part: an estimate from a job and a model's sizes. Nothing is run."""

from __future__ import annotations

import math

from raydist.job.plan import Plan
from raydist.job.schema import Job, Train
from raydist.model.build import Sizes
from raydist.model.head import rows_at_once
from raydist.parallel.optimizer import state_bytes

FP32, BF16 = 4, 2
FIXED = ("weights", "gradients", "optimizer")
"""Parts that do not depend on the micro batch; what is kept in host memory has other names."""


def worker_memory(job: Job, plan: Plan, sizes: Sizes) -> dict[str, int]:
    """Bytes by part, without what a sharding strategy gathers of a layer at a time.

    Activations: 34 bytes per token, layer and hidden unit in 16 bits, 4 in a layer that is recomputed, 24 in
    one that keeps its products and attention (6 for queries, keys and values, 2 for attention and 2 for its
    projection, 8 and 2 in the MLP, 4 as above). The rule is that of Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", section 4, without its attention-score term: the
    scores are never kept.
    """
    compute = FP32 if job.train.mixed_precision == "fp32" else BF16
    tokens = plan.micro_batch_tokens
    strategy, sharded = job.strategy, 3 if job.strategy.name == "fsdp" else job.strategy.stage or 0
    stepped = state_bytes(sizes.model, job.train)
    if strategy.name == "zero":
        stepped += sizes.trainable * FP32  # DeepSpeed steps a copy of the weights
    host = "_in_host_memory" if strategy.offload == "cpu" else ""

    def share(n_bytes: int, stage: int) -> int:
        """Of what is sharded from this stage on."""
        return math.ceil(n_bytes / plan.world_size) if sharded >= stage else n_bytes

    parts = {
        f"weights{host if sharded == 3 else ''}": share(sizes.weight_bytes, 3),
        "gradients": share(sizes.trainable * FP32, 2),
        f"optimizer{host}": share(stepped, 1),
        "activations": tokens * sizes.hidden * compute * kept_values(job.train, sizes.layers),
        "logits": 2 * rows_at_once(tokens, sizes.vocabulary) * sizes.vocabulary * FP32,
    }
    return {**parts, "total": sum(parts.values())}


def on_device(parts: dict[str, int]) -> int:
    """Of `worker_memory`'s parts, those that lie on the worker's device, together."""
    return sum(n for name, n in parts.items() if name != "total" and not name.endswith("_in_host_memory"))


def kept_values(train: Train, layers: int) -> int:
    """Activations kept for the backward pass, per token and hidden unit, in all layers."""
    whole, recomputed, selective = 34 // 2, 4 // 2, 24 // 2
    which = train.gradient_checkpointing
    if which == "selective":
        return layers * selective
    if isinstance(which, bool):
        return layers * (recomputed if which else whole)
    n = math.ceil(layers / which)
    return n * recomputed + (layers - n) * whole
