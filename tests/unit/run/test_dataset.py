"""When training may begin before the token logs are complete."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.job.load import build_job
from raydist.run.dataset import can_begin_early

ONE = {"one": {"path": "one.jsonl"}}
TWO = {**ONE, "two": {"path": "two.jsonl"}}
WEIGHTED = {name: {**source, "weight": 0.5} for name, source in TWO.items()}


@pytest.mark.parametrize(
    ("early", "sources", "more"),
    [
        (True, ONE, {}),
        (True, WEIGHTED, {}),
        (False, TWO, {}),
        (False, ONE, {"prepare": {"wait": "all"}}),
        (False, ONE, {"train": {"epochs": 2}}),
        (False, ONE, {"dedup": "exact"}),
        (False, ONE, {"stages": [{"block_size": 64, "max_tokens": 640}]}),
    ],
    ids=["one source", "weights", "merged", "wait", "epochs", "dedup", "stages"],
)
def test_training_begins_early_where_the_order_of_samples_is_known(
    early: bool, sources: dict[str, Any], more: dict[str, Any]
) -> None:
    more = dict(more)
    corpus = {"sources": sources, "dedup": more.pop("dedup", "none")}
    train = {"global_batch_size": 2} if "stages" in more else {"max_steps": 5, "global_batch_size": 2}
    job = {"name": "early", "model": {"base": "some/model"}, "corpus": corpus, "train": train, **more}
    assert can_begin_early(build_job(job)) is early
