"""The README.md of a trained model's folder."""

from __future__ import annotations

from raydist.training.checkpoint import Commit
from raydist.training.spec import TrainSpec


def model_card(spec: TrainSpec, weights: Commit) -> str:
    """Markdown with a Hub header. weights: the commit, made or not, of the weights beside the card."""
    job = spec.job
    origin = f"base_model: {job.model.base}\n" if job.model.base else ""
    adapter = "library_name: peft\n" if job.adapter else "library_name: transformers\n"
    start = (
        f"`{job.model.base}`"
        if job.model.base
        else f"random weights ({(job.model.config or {})['model_type']})"
    )
    method = f"LoRA, rank {job.adapter.r}" if job.adapter else "all weights"
    rows = "".join(
        f"| {name} | {r['n_documents']:,} | {r['eval_loss']:.4f} | {r['perplexity']:.3f} "
        f"| {r['bits_per_byte']:.4f} |\n"
        for name, r in weights.evals.items()
    )
    logs = "".join(f"- {name}: `{path.name}`\n" for name, path in spec.logs.items())
    return f"""---
{origin}{adapter}pipeline_tag: text-generation
tags: [raydist]
---

# {job.name}

Trained by raydist from {start}, {method}: {weights.step:,} steps of
{spec.plan.global_batch_size} sequences of {spec.plan.block_size} tokens, {weights.seen.tokens:,} document
tokens, learning rate {job.train.lr:g} ({job.train.scheduler}), compute in {job.train.mixed_precision}.

## Held-out text

| source | documents | loss | perplexity | bits per byte |
|---|---|---|---|---|
{rows}
## Data

Token logs by fingerprint, and the fingerprint of the feed that mixed and packed them: `{weights.feed}`.

{logs}"""
