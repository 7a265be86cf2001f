"""A run that went undisturbed, made once for all tests that compare theirs with it."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.folder import RunFolder
from tests.whole_run import folder_of, submit, whole_job, write_corpus


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job of two workers. Tests give theirs another name; they share its storage and its token log."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder / "text.jsonl")
    return whole_job(folder / "text.jsonl", folder / "runs")


@pytest.fixture(scope="session")
def undisturbed(whole: dict[str, Any]) -> tuple[RunFolder, str]:
    """That job, submitted by a process of its own, with every tracker; its folder and what it printed."""
    job = {**whole, "tracking": {"tensorboard": True, "wandb": True}}
    code, output = submit(job)
    assert code == 0, output
    return folder_of(job), output
