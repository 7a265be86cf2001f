"""Checks of a job before anything is prepared or trained: without Ray, then on the cluster that there is."""

from __future__ import annotations

import torch

from raydist.cluster.resources import gpus
from raydist.job.schema import Job
from raydist.model import quantization
from raydist.model.attention.choose import check_attention
from raydist.model.build import check_base, check_fits, check_tokenizer, load_config, model_sizes, quietly
from raydist.model.precision import check_precision
from raydist.parallel.optimizer import state_bytes
from raydist.parallel.zero import check_deepspeed
from raydist.track.start import check_trackers
from raydist.training.collate import make_collator
from raydist.training.hooks import load_hooks


@quietly()
def check_job(job: Job) -> None:
    """Raises JobError or ModelError for what the model, its libraries or the trackers cannot do."""
    check_trackers(job)
    config = load_config(job)
    check_fits(config, job)
    if job.quantization is not None:
        quantization.check_bitsandbytes(torch.device("cpu"))
    if job.adapter is not None or job.train.optimizer.name != "adamw":
        state_bytes(model_sizes(config, job).model, job.train)
    if job.strategy.name == "zero":
        check_deepspeed(job)
    make_collator(job.train.collator)
    load_hooks(job.train.hooks)
    if job.model.base is not None:
        check_base(job)
        check_tokenizer(job)


def check_on_cluster(job: Job) -> None:
    """Raises ModelError or JobError for an attention or a precision that the workers' devices do not have."""
    device_type = "cuda" if job.scaling.on_gpus(gpus()) else "cpu"
    check_attention(job.model.attn_implementation, device_type)
    check_precision(job.train.mixed_precision, device_type)
