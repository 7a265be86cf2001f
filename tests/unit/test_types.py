"""What a type checker knows of the public Python API, in a program under mypy's strict rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """\
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

import raydist
from raydist.autotrain import LLMTrainingParams, train
from raydist.corpus.log import Document, Shard, TokenLog
from raydist.feed.feed import Feed
from raydist.feed.loader import Step
from raydist.feed.packing import Block
from raydist.model.base import CausalModel
from raydist.run.dataset import Prepared
from raydist.sweep.sweep import SweepResult
from peft import PeftModelForCausalLM
from transformers import PreTrainedModel

job = raydist.load_job("job.yaml", ["train.lr=1e-4"])
assert_type(job, raydist.Job)
assert_type(job.train.lr, float)

result = raydist.train(job)
assert_type(result, raydist.RunResult)
assert_type(result.folder, Path)
assert_type(result.model_path, Path)
assert_type(result.state, str)
assert_type(result.metrics["books"]["perplexity"], float | None)
assert_type(result.load_model(), CausalModel | PeftModelForCausalLM)

assert_type(raydist.submit(job, address="http://head:8265"), int)

sweep = raydist.tune(job)
assert_type(sweep, SweepResult)
assert_type(sweep.best, Path | None)
assert_type(sweep.trials[0].bits_per_byte, float | None)

prepared = raydist.prepare(job)
assert_type(prepared, Prepared)
assert_type(prepared.logs, dict[str, TokenLog])

feed = raydist.open_feed("runs/a")
assert_type(feed, Feed)
assert_type(feed.samples_per_epoch, int | None)
block = feed.block(3)
assert_type(block, Block)
assert_type(block["sample"], int)
assert_type(block["labels"], NDArray[np.int64])
assert_type(block["document_lengths"], NDArray[np.int32])
steps = feed.loader(0, 1, global_batch_size=8, micro_batch_size=4)
assert_type(steps, Iterator[Step])
for step in steps:
    assert_type(step.n_labels, int)
    assert_type(step.micro_batches, list[dict[str, torch.Tensor]])

assert_type(raydist.blocks(job, stop=100), ray.data.Dataset)

log = raydist.open_log("runs/tokens/0")
assert_type(log, TokenLog)
assert_type(log.shards, tuple[Shard, ...])
assert_type(log.documents(), Iterator[Document])
assert_type(next(log.documents())["file"], str)


class Mine(raydist.Hook):
    pass


model = train(LLMTrainingParams(model="gpt2"))
assert_type(model, CausalModel | PeftModelForCausalLM)
if not isinstance(model, PeftModelForCausalLM):
    whole: PreTrainedModel = model.eval()
    model.generate(max_new_tokens=8)
"""

UNKNOWN = "import raydist\nraydist.trian\n"


def checked(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", "program.py"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # reads torch and transformers where mypy has no cache of them yet
def test_a_typed_program_gets_precise_types(tmp_path: Path) -> None:
    done = checked(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    done = checked(tmp_path, UNKNOWN)
    assert done.returncode == 1 and 'has no attribute "trian"' in done.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "raydist" / "py.typed").exists()
