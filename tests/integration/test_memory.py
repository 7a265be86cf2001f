"""A micro batch that does not fit is halved until it does; the global batch, and so the run, stays."""

from __future__ import annotations

import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import raydist
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.plan import make_plan
from raydist.prepared import find_prepared
from raydist.track.records import effective, read_metrics
from raydist.training.loop import train

Tensors = dict[str, torch.Tensor]
ROOM_BYTES = 300 * 2**20
VOCABULARY = 16_384
_limited = False


def cramped(batch: Tensors) -> Tensors:
    """A collator that leaves the worker so much room and no more, from its first batch on."""
    global _limited
    if not _limited:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
        _limited = True
    return batch


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Logits of 16 blocks are 256 MiB in fp32, and as much again is their gradient."""
    lines = (" ".join(f"word{(i * 7 + j) % 97}" for j in range(40 + i % 30)) for i in range(300))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    words = {"<|endoftext|>": 0, **{f"word{i}": i + 1 for i in range(VOCABULARY - 1)}}
    core = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    core.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "words"
    )
    return {
        "name": "cramped",
        "storage": str(tmp_path / "runs"),
        "model": {"config": llama, "tokenizer": str(tmp_path / "words")},
        "corpus": {"sources": {"text": {"path": str(tmp_path / "text.txt")}}, "holdout": 0.0},
        "packing": {"block_size": 256},
        "train": {
            "max_steps": 3,
            "global_batch_size": 16,
            "lr": 1e-2,
            "mixed_precision": "fp32",
            "collator": f"{__name__}:cramped",
            "logging_steps": 1,
        },
        "tracking": {"mlflow": False},
    }


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in effective(run) if record["kind"] == "train"]


@pytest.mark.slow
def test_a_micro_batch_that_does_not_fit_is_halved(
    job: dict[str, Any], ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(raydist.train(build_job(job)).folder)
    tried = [r["micro_batch_size"] for r in read_metrics(folder.path) if r["kind"] in ("start", "resume")]
    assert tried[0] == 16 and len(tried) >= 2
    assert all(2 * later == earlier for earlier, later in pairwise(tried))
    assert folder.data()["micro_batch_tokens"] == 256 * tried[-1]
    assert "out of memory with micro batches of 16 sequences; going on with 8" in "".join(capfd.readouterr())

    free = build_job({**job, "train": {**job["train"], "collator": None, "micro_batch_size": 2}})
    roomy = RunFolder(folder.path.with_name("roomy"))
    roomy.path.mkdir()
    train(find_prepared(free).train_spec(roomy, make_plan(free, 1, None), 1))
    assert len(losses(folder.path)) == 3
    assert losses(folder.path) == pytest.approx(losses(roomy.path), rel=1e-4)
