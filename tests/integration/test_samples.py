"""`blocks`, `open_feed` and the trainer give the very same samples; other programs train on them."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

import raydist
from raydist.job.load import build_job, job_yaml
from raydist.job.schema import Job

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Job:
    """Two weighted sources, so that the mixture too is compared."""
    folder = tmp_path_factory.mktemp("samples")
    for name, count in (("one", 150), ("two", 90)):
        lines = (
            orjson.dumps({"text": f"{name} {i} " + f"word{i % 13} " * (5 + i % 60)}) for i in range(count)
        )
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    values: dict[str, Any] = {
        "name": "samples",
        "storage": str(folder),
        "model": {"config": {"model_type": "llama"}, "tokenizer": {"train": {"vocab_size": 400}}},
        "corpus": {
            "sources": {
                "one": {"path": str(folder / "one.jsonl"), "weight": 0.75},
                "two": {"path": str(folder / "two.jsonl"), "weight": 0.25},
            },
            "slice_bytes": 8000,
        },
        "packing": {"block_size": 64},
        "train": {"max_steps": 10},
    }
    made = build_job(values)
    raydist.prepare(made)
    return made


def test_blocks_are_the_feed_in_order(job: Job) -> None:
    feed = raydist.open_feed(job)
    rows = raydist.blocks(job, start=7, stop=300).take_all()
    assert not logging.getLogger("ray.data").isEnabledFor(logging.WARNING)  # nothing is printed
    assert [row["sample"] for row in rows] == list(range(7, 300))
    assert set(rows[0]) == {"input_ids", "labels", "position_ids", "sample"}
    for row in rows[::17]:
        expected = feed.block(row["sample"])
        for column in ("input_ids", "labels", "position_ids"):
            np.testing.assert_array_equal(row[column], expected[column])


def test_ranks_share_the_same_global_batches(job: Job) -> None:
    feed = raydist.open_feed(job)
    for world_size in (1, 2, 3):
        loaders = [
            feed.loader(r, world_size, 8, 48, global_batch_size=8, micro_batch_size=2)
            for r in range(world_size)
        ]
        for index, steps in enumerate(zip(*loaders, strict=True)):
            samples = sorted(
                s for step in steps for m in step.micro_batches for s in m["sample"].tolist() if s >= 0
            )
            assert samples == list(range(8 + 8 * index, 16 + 8 * index))


def test_a_mixture_without_an_end_asks_for_one(job: Job) -> None:
    with pytest.raises(raydist.errors.RunError, match="no end"):
        raydist.blocks(job)


@pytest.mark.parametrize("example", ["from_feed.py", "from_blocks.py"])
def test_the_documented_examples_train(job: Job, example: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(job_yaml(job))
    losses = runpy.run_path(str(EXAMPLES / example))["train"](str(path), steps=4)
    assert len(losses) == 4 and losses[-1] < losses[0]
    source = (EXAMPLES / example).read_text().splitlines()
    assert (
        len([line for line in source if line.strip() and not line.startswith(("import", "from", '"""'))])
        <= 20
    )
