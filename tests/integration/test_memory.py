"""Whole runs whose workers really run out of memory: the micro batch that fits is found, and remembered."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from raydist.errors import JobError, ModelError
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.plan import make_plan
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import find_prepared
from raydist.run.run import run_job
from raydist.track.records import effective, read_metrics
from raydist.training.loop import train
from tests.whole_run import CONFIG, write_corpus

SPARE_BYTES = 560 * 2**20
WIDE = {**CONFIG, "intermediate_size": 16_384, "num_hidden_layers": 1}
"""A sequence of 64 tokens takes 4 MiB per tensor of its activations; the weights are small."""
_limited = False


def mask(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch["labels"][batch["labels"] % 5 == 0] = -100
    return batch


def limit_last_rank(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`mask`; and the last rank's address space is limited from its first micro batch on."""
    global _limited
    if not _limited and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
        _limited = True
    return mask(batch)


@pytest.fixture
def job(tmp_path: Path, ray_local: None) -> dict[str, Any]:
    write_corpus(tmp_path / "text.jsonl", 60)
    return {
        "name": "found",
        "storage": str(tmp_path),
        "model": {"config": WIDE, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {"sources": {"words": {"path": str(tmp_path / "text.jsonl")}}},
        "packing": {"block_size": 64},
        "train": {
            "max_steps": 3,
            "global_batch_size": 32,
            "mixed_precision": "fp32",
            "logging_steps": 1,
            "collator": f"{__name__}:limit_last_rank",
        },
        "eval": {"max_tokens": 500},
        "tracking": {"mlflow": False},
        "scaling": {"max_failures": 0},
    }


def change(job: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {**job, **{name: {**job.get(name, {}), **values} for name, values in sections.items()}}


def began(folder: RunFolder) -> list[int]:
    """The micro batch size of each attempt."""
    return [r["micro_batch_size"] for r in read_metrics(folder) if r["kind"] in ("start", "resume")]


def losses(folder: RunFolder) -> list[float]:
    return [r["loss"] for r in effective(folder) if r["kind"] == "train"]


@pytest.mark.slow
def test_the_micro_batch_that_fits_is_found(job: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    run_job(build_job(job))
    folder = RunFolder(Path(job["storage"], "found"))
    assert began(folder) == [32, 16]
    told = "out of memory with micro batches of 32 sequences; going on with 16"
    assert told in "".join(capfd.readouterr())
    assert [*folder.data()["micro_batch_halved"].values()] == [16 * 64]

    free = build_job(change(job, train={"micro_batch_size": 4, "collator": f"{__name__}:mask"}))
    roomy = RunFolder(folder.path.with_name("roomy"))
    roomy.path.mkdir()
    train(attempt_spec(find_prepared(free), roomy, make_plan(free, 1, None), 1))
    assert len(losses(folder)) == 3
    assert losses(folder) == pytest.approx(losses(roomy), abs=1e-4)


@pytest.mark.slow
def test_two_workers_in_epochs_of_which_one_runs_out_of_memory(job: dict[str, Any]) -> None:
    """A collator, a named attention, checkpoints at the ends of epochs; and a resume with what was found."""
    ends = {"checkpoint": {"save_steps": "epoch"}, "eval": {"eval_steps": "epoch"}}
    both = {"max_steps": None, "epochs": 2, "global_batch_size": 64}
    model = {"attn_implementation": "eager"}
    asked = build_job(change(job, model=model, train=both, scaling={"num_workers": 2}, **ends))
    run_job(asked)
    folder = RunFolder(Path(job["storage"], "found"))
    assert began(folder) == [32, 16]
    first, last = folder.committed_steps()
    assert [r["step"] for r in effective(folder) if r["kind"] == "eval"] == [0, first, last]
    shutil.rmtree(folder.checkpoints / f"step-{last:08}")
    folder.set_status("failed")
    run_job(asked)
    assert began(folder) == [32, 16, 16] and folder.committed_steps() == [first, last]


def test_what_cannot_be_used_is_told_before_anything_is_prepared(job: dict[str, Any]) -> None:
    flash = change(job, model={"attn_implementation": "flash_attention_2"}, train={"mixed_precision": "bf16"})
    with pytest.raises(ModelError, match="runs on GPUs"):
        run_job(build_job(flash))
    with pytest.raises(JobError, match="fp16 needs GPUs"):
        run_job(build_job(change(job, train={"mixed_precision": "fp16"})))
    with pytest.raises(JobError, match=r"cannot import tests.integration.test_memory:misspelt"):
        run_job(build_job(change(job, train={"collator": f"{__name__}:misspelt"})))
    assert not Path(job["storage"], "tokens").exists()
