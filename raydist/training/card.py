"""The README.md of a trained model's folder."""

from __future__ import annotations

from raydist.job.plan import Plan
from raydist.job.schema import Job
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Position


def model_card(spec: AttemptSpec, weights: Position, feed: str) -> str:
    """Markdown with a Hub header. weights: where the run was with these weights.  feed: its fingerprint."""
    job, base = spec.job, spec.job.model.base
    origin = f"base_model: {base}\n" if base else ""
    library = "peft" if job.adapter else "transformers"
    start = f"`{base}`" if base else f"random weights ({(job.model.config or {})['model_type']})"
    method = f"LoRA, rank {job.adapter.r}" if job.adapter else "all weights"
    method += f" on the frozen base quantized to {job.quantization}" if job.quantization else ""
    rows = "".join(
        f"| {name} | {r['n_documents']:,} | {r['eval_loss']:.4f} | {r['perplexity']:.3f} "
        f"| {r['bits_per_byte']:.4f} |\n"
        for name, r in weights.evals.items()
    )
    logs = "".join(f"- {name}: `{path.name}`\n" for name, path in spec.logs.items())
    return f"""---
{origin}library_name: {library}
pipeline_tag: text-generation
tags: [raydist]
---

# {job.name}

Trained by raydist from {start}, {method}: {weights.step:,} steps of
{_batches(spec.plan)}, {weights.seen.tokens:,} document
tokens, learning rate {job.train.lr:g} ({job.train.scheduler}{_segments(spec.plan)}),
compute in {job.train.mixed_precision}.

{_how_to_load(job)}## Held-out text

| source | documents | loss | perplexity | bits per byte |
|---|---|---|---|---|
{rows}
## Data

Token logs by fingerprint, and the fingerprint of the feed that mixed and packed them: `{feed}`.

{logs}"""


def _segments(plan: Plan) -> str:
    steps = [f"{segment.steps:,}" for segment in plan.segments]
    return f", in segments of {', '.join(steps)} steps" if len(steps) > 1 else ""


def _batches(plan: Plan) -> str:
    each = (f"{stage.global_batch_size} sequences of {stage.block_size} tokens" for stage in plan.stages)
    return ", then of ".join(each)


def _how_to_load(job: Job) -> str:
    """Shown for an adapter on a quantized base, which peft alone would put on the original weights."""
    if job.quantization is None:
        return ""
    product = "rounds activations to 8 bits too" if job.quantization == "int8" else "may compute in bf16"
    return f"""## How to load it

The adapter belongs to the base's weights as `quantization_config.json` quantizes them, and to no others:

```python
import json
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder = "."  # this one
with open(f"{{folder}}/quantization_config.json") as file:
    quantization = BitsAndBytesConfig(**json.load(file))
base = AutoModelForCausalLM.from_pretrained("{job.model.base}", quantization_config=quantization)
model = PeftModel.from_pretrained(base, folder)
```

Loaded like this, bitsandbytes {product}. `raydist export {job.name} --merge` writes a plain model that
computes what was trained.

"""
