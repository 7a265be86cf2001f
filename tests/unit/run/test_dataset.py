"""When training may begin before the token logs are complete."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.corpus.tokenizer import TokenizerSpec
from raydist.job.load import build_job
from raydist.run.dataset import can_begin_early, document_begin

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


def test_a_run_goes_on_with_the_bos_that_it_began_with() -> None:
    """One that began before there was the key has none in its pins, and its documents begin with none."""
    corpus = {"sources": ONE}
    job = {"name": "a", "model": {"base": "some/model"}, "corpus": corpus, "train": {"max_steps": 5}}
    tokenizer = TokenizerSpec("", "folder", 0, 64, "words", bos_token_id=1, prefix=(1,))
    auto, without = build_job(job), build_job({**job, "packing": {"add_bos_token": False}})
    assert document_begin(auto, tokenizer, None) == 1
    assert document_begin(auto, tokenizer, {"bos": 1}) == 1
    assert document_begin(auto, tokenizer, {"bos": None}) is None
    assert document_begin(auto, tokenizer, {"tokenizer": {}}) is None
    assert document_begin(without, tokenizer, {"bos": 1}) is None
    always = build_job({**job, "packing": {"add_bos_token": True}})  # a trial of a sweep may ask for it
    assert document_begin(always, tokenizer, {"bos": None}) == 1
