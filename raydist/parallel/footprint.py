"""The memory that a worker needs, by part: an estimate from a job and a model's sizes. Nothing is run."""

from __future__ import annotations

import math

from raydist.job.plan import Plan
from raydist.job.schema import Job, Train
from raydist.model.build import Sizes
from raydist.model.head import rows_at_once
from raydist.model.kept import kept_for_backward
from raydist.parallel.build import keeps_16_bits
from raydist.parallel.optimizer import state_bytes

FP32, BF16 = 4, 2
PROCESS_BYTES = 850_000_000
"""Resident memory of a worker without a model: Python, torch, transformers, Ray. Only on CPU it counts."""
FIXED = ("weights", "gradients", "optimizer")
"""Parts that do not depend on the micro batch; what is kept in host memory has other names."""


def worker_memory(job: Job, plan: Plan, sizes: Sizes, *, on_cpu: bool = False) -> dict[str, int]:
    """Bytes by part at the peak, without what a sharding strategy gathers of a layer at a time.

    total: of the parts on the worker's device.

    on_cpu: then the process itself counts, as in the memory that the records of a run on CPU give.
    """
    strategy, sharded = job.strategy, 3 if job.strategy.name == "fsdp" else job.strategy.stage or 0
    stepped = state_bytes(sizes.model, job.train)
    if strategy.name == "zero":
        stepped += sizes.trainable * FP32  # DeepSpeed steps a copy of the weights
    host = "_in_host_memory" if strategy.offload == "cpu" else ""

    def share(n_bytes: int, stage: int) -> int:
        """Of what is sharded from this stage on."""
        return math.ceil(n_bytes / plan.world_size) if sharded >= stage else n_bytes

    activations, copies = _activations(job, plan, sizes)
    a_layer_at_a_time = sharded == 3 or (not on_cpu and keeps_16_bits(job))
    rows = rows_at_once(plan.micro_batch_tokens, sizes.vocabulary)
    in_parts = rows < plan.micro_batch_tokens and job.adapter is None
    parts = {
        f"weights{host if sharded == 3 else ''}": share(sizes.weight_bytes, 3),
        "weights_in_16_bits": 0 if a_layer_at_a_time else copies,
        "gradients": share(sizes.trainable * FP32, 2),
        f"optimizer{host}": share(stepped, 1),
        "activations": activations,
        # and the gradient of the head, added up over the parts
        "logits": (2 * rows + in_parts * sizes.hidden) * sizes.vocabulary * FP32,
        "process": PROCESS_BYTES if on_cpu else 0,
        f"checkpoint_copy{'' if on_cpu else '_in_host_memory'}": _copied_state(job, plan, sizes),
    }
    parts = {name: n_bytes for name, n_bytes in parts.items() if n_bytes}
    return {**parts, "total": on_device(parts)}


def _copied_state(job: Job, plan: Plan, sizes: Sizes) -> int:
    """A worker's copy of weights and optimizer state, from which checkpoints are written."""
    if not job.checkpoint.asynchronous:
        return 0
    return math.ceil((sizes.trainable * FP32 + state_bytes(sizes.model, job.train)) / plan.world_size)


def on_device(parts: dict[str, int]) -> int:
    """Of `worker_memory`'s parts, those that lie on the worker's device, together."""
    return sum(n for name, n in parts.items() if name != "total" and not name.endswith("_in_host_memory"))


def _activations(job: Job, plan: Plan, sizes: Sizes) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass: of the tokens, and copies of weights."""
    tokens, block_size = plan.micro_batch_tokens, max(stage.block_size for stage in plan.stages)
    kept = kept_for_backward(sizes.model, job, sizes.layers, block_size)
    if kept is None:
        compute = FP32 if job.train.mixed_precision == "fp32" else BF16
        return tokens * sizes.hidden * compute * kept_values(job.train, sizes.layers), 0
    which, layers = job.train.gradient_checkpointing, sizes.layers
    if which is False:
        of_layers = layers * kept.layer
    elif which == "selective":
        of_layers = (layers * SELECTIVE + 1 - SELECTIVE) * kept.layer
    else:  # of a layer that is recomputed its input; while it is, it keeps what others kept, which are freed
        recomputed = math.ceil(layers / int(which))
        of_layers = recomputed * kept.between + max(layers - recomputed, 1) * kept.layer
    quantized = job.quantization is not None  # these weights are kept as they are
    return max(0, round(tokens * (of_layers + kept.around))), 0 if quantized else max(0, kept.copies)


SELECTIVE = 24 / 34
"""The share of a layer's activations that are products and attention."""


def kept_values(train: Train, layers: int) -> int:
    """Activations of 16 bits kept for the backward pass, per token and hidden unit, in all layers.

    For an architecture that cannot be tried. 34 bytes per token, layer and hidden unit, 4 in a layer that is
    recomputed, 24 in one that keeps its products and attention (6 for queries, keys and values, 2 for
    attention and 2 for its projection, 8 and 2 in the MLP, 4 as above). The rule is that of Korthikanti et
    al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, without its
    attention-score term: the scores are never kept.
    """
    whole, recomputed, selective = 34 // 2, 4 // 2, 24 // 2
    which = train.gradient_checkpointing
    if which == "selective":
        return layers * selective
    if isinstance(which, bool):
        return layers * (recomputed if which else whole)
    n = math.ceil(layers / which)
    return n * recomputed + (layers - n) * whole
