"""A run that went undisturbed, made once for all tests that compare theirs with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raydist.cli import main
from raydist.folder import RunFolder
from tests.whole_run import folder_of, submit, whole_job, write_corpus

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: command(*arguments) -> (exit status, output)."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert isinstance(ended.value.code, int)
        return ended.value.code, "".join(capfd.readouterr())

    return run


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
