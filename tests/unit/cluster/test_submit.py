"""What of the user's goes along with a job, what a run is called there, and how its log is read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from raydist.cluster.remote import OutputPrinter, run_async
from raydist.cluster.submit import own_modules, run_key, with_absolute_paths
from raydist.errors import ClusterError, JobError
from raydist.job.load import build_job
from raydist.job.schema import Job


def job(*clean: str, storage: str = "runs") -> Job:
    values = {
        "name": "mine",
        "storage": storage,
        "model": {"base": "some/model"},
        "corpus": {"sources": {"web": {"path": "/data/*.jsonl"}}, "clean": list(clean)},
        "train": {"max_steps": 1},
    }
    return build_job(values)


def test_modules_of_the_working_folder_go_along_and_installed_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").touch()
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "on_path.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    steps = ["whitespace", "mine:f", "mine:g", "package.inner:f", "on_path:f", "textwrap:dedent", "yaml:dump"]
    found = own_modules(job(*steps))
    assert found == [tmp_path / "mine.py", tmp_path / "package", tmp_path / "elsewhere" / "on_path.py"]
    assert own_modules(job("sys:intern")) == []
    train = {"max_steps": 1, "collator": "mine:f", "hooks": ["on_path:Alert"]}
    hooked = build_job({**job().model_dump(mode="json"), "train": train})
    assert own_modules(hooked) == [tmp_path / "mine.py", tmp_path / "elsewhere" / "on_path.py"]
    with pytest.raises(JobError, match=r"(?s)no module nowhere is found.*corpus.clean\[1\]"):
        own_modules(job("mine:f", "nowhere.inner:f"))


def test_a_run_is_known_by_its_absolute_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {
        run_key(with_absolute_paths(job(storage=s), "http://127.0.0.1:8265")) for s in ("runs", "./runs/")
    }
    assert keys == {f"{tmp_path}/runs/mine"}
    with pytest.raises(JobError, match="storage: runs"):
        with_absolute_paths(job(), "http://head:8265")


def test_a_job_is_followed_also_inside_a_running_event_loop() -> None:
    """As in a notebook. What it raises is raised there too."""

    async def answer(given: int) -> int:
        await asyncio.sleep(0)
        if given < 0:
            raise ClusterError("lost")
        return given

    async def notebook() -> int:
        with pytest.raises(ClusterError, match="lost"):
            run_async(answer(-1))
        return run_async(answer(7))

    assert run_async(answer(3)) == 3 and asyncio.run(notebook()) == 7


def test_every_line_of_a_jobs_output_is_printed_once() -> None:
    said: list[str] = []
    printer, text = OutputPrinter(said.append), "one\ntwo\n\nthree\nhalf"
    for broken in (3, 5, 9, len(text)):
        printer.restart()
        for start in range(0, broken, 4):
            printer.take(text[start : min(start + 4, broken)])
    printer.end()
    assert "\n".join(said) == text
