"""Which jobs may extend a run, and what its folder keeps of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raydist import files
from raydist.errors import JobError, RunChanged
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.job.segments import mixes, segments_of
from raydist.run.lifecycle import Life
from raydist.track.listener import Listener

STEPS = 4
PINS = {"tokenizer": {"folder": "words"}, "logs": {"a": "1", "b": "2"}, "eval_logs": {}, "bos": None}
SOURCES = {"a": {"path": "a.txt", "weight": 0.5}, "b": {"path": "b.txt", "weight": 0.5}}
WITH_C = {
    "c": {"path": "c.txt", "weight": 0.5},
    "a": {"path": "a.txt", "weight": 0.3},
    "b": {"path": "b.txt", "weight": 0.2},
}
MORE = {"max_tokens": 640}
"""Two steps."""


def a_job(storage: Path, extend: Any = (), sources: Any = SOURCES, **more: Any) -> Job:
    values = {
        "name": "r",
        "storage": str(storage),
        "model": {"base": "b"},
        "packing": {"block_size": 32},
        "corpus": {"sources": sources, **more.pop("corpus", {})},
        "train": {"max_steps": STEPS, "global_batch_size": 10, "extend": extend, **more.pop("train", {})},
    }
    return Job.model_validate(values | more)


def submit(job: Job, step: int | None = None, error: BaseException | None = None) -> RunFolder:
    """As far as a driver goes before it prepares; with a checkpoint of that step, or ended by an error."""
    life = Life(job, "run", Listener())
    with life.held(), life.begun():
        if step is not None:
            files.write_text(life.folder.checkpoint(step) / "COMMIT.json", "{}")
        if error is not None:
            raise error
    return life.folder


def finished(job: Job) -> RunFolder:
    folder = submit(job, STEPS)
    folder.add_data(pins=PINS)
    return folder


def test_an_extension_keeps_what_was_trained_and_what_each_segment_is_made_of(tmp_path: Path) -> None:
    folder = finished(a_job(tmp_path))
    job = a_job(tmp_path, MORE, WITH_C)
    submit(job, STEPS + 2)
    assert folder.committed_steps() == [STEPS, STEPS + 2]
    segments = segments_of(folder.data()["pins"], job)
    assert [(each.first_step, each.first_sample, each.steps) for each in segments] == [(0, 0, 4), (4, 40, 2)]
    assert list(segments[1].shares) == ["a", "b", "c"]  # a source keeps its place in the feed
    assert [mix.weights for mix in mixes(segments)] == [{"a": 0.5, "b": 0.5}, {"a": 0.3, "b": 0.2, "c": 0.5}]
    again = Life(job, "run", Listener())
    with again.held():
        assert again.finished
    more = a_job(
        tmp_path,
        [MORE, {**MORE, "rewarm": False}],
        WITH_C,
        train={"min_lr_ratio": 0.0, "scheduler": "constant"},
    )
    with pytest.raises(RunChanged, match=r"train\.scheduler"):
        submit(more)
    third = a_job(
        tmp_path,
        [MORE, MORE],
        SOURCES
        | {"a": {"path": "a.txt", "weight": 0.4}, "b": {"path": "b.txt", "weight": 0.1}, "c": WITH_C["c"]},
    )
    submit(third)
    assert [each.first_step for each in segments_of(folder.data()["pins"], third)] == [0, 4, 6]
    assert segments_of(folder.data()["pins"], third)[:2] == segments


def test_a_run_that_is_not_extended_keeps_nothing_of_segments(tmp_path: Path) -> None:
    folder = finished(a_job(tmp_path))
    submit(a_job(tmp_path))
    assert folder.data()["pins"] == PINS


def test_an_extension_may_change_or_be_taken_back_until_it_is_trained(tmp_path: Path) -> None:
    folder = finished(a_job(tmp_path))
    wrong = a_job(tmp_path, MORE, WITH_C | {"c": {"path": "no.txt", "weight": 0.5}})
    with pytest.raises(JobError):
        submit(wrong, error=JobError("no such file"))
    folder.add_data(pins={**folder.data()["pins"], "logs": PINS["logs"] | {"c": "of another path"}})
    submit(a_job(tmp_path, {"max_tokens": 320}, WITH_C))
    kept = folder.data()["pins"]
    assert kept["logs"] == PINS["logs"] and [each["steps"] for each in kept["segments"]] == [4, 1]
    submit(a_job(tmp_path))
    assert folder.data()["pins"] == PINS
    submit(a_job(tmp_path, MORE, WITH_C), STEPS + 1)
    for job in (a_job(tmp_path), a_job(tmp_path, {"max_tokens": 320}, WITH_C), a_job(tmp_path, MORE)):
        with pytest.raises(RunChanged):
            submit(job)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"train": {"lr": 1e-3}}, r"train\.lr"),
        ({"train": {"max_steps": 5}}, r"train\.max_steps"),
        ({"packing": {"block_size": 64}}, r"packing\.block_size"),
        ({"corpus": {"holdout": 0.1}}, r"corpus\.holdout"),
        ({"sources": {"a": {"path": "a.txt", "weight": 1.0}}}, r"corpus\.sources\.b\.path: 'b.txt' -> None"),
        ({"sources": SOURCES | {"b": {"path": "d.txt", "weight": 0.5}}}, r"corpus\.sources\.b\.path"),
        ({"sources": {name: {"path": f"{name}.txt"} for name in "ab"}}, "every source needs a weight"),
    ],
)
def test_all_but_weights_and_new_sources_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = finished(a_job(tmp_path))
    before = folder.job_file.read_bytes(), folder.data_file.read_bytes()
    with pytest.raises(RunChanged, match=rf"(?s)no extension of the run r.*{says}"):
        submit(a_job(tmp_path, MORE, **change))
    assert before == (folder.job_file.read_bytes(), folder.data_file.read_bytes())


def test_sources_that_are_read_as_one_cannot_be_joined_but_a_single_one_can(tmp_path: Path) -> None:
    unweighted = {name: {"path": f"{name}.txt"} for name in "ab"}
    finished(a_job(tmp_path / "two", sources=unweighted))
    submit(a_job(tmp_path / "two", MORE, unweighted))
    with pytest.raises(RunChanged, match="the run reads a, b as one, without weights"):
        submit(a_job(tmp_path / "two", MORE, WITH_C))
    finished(a_job(tmp_path / "one", sources={"a": {"path": "a.txt"}}))
    with pytest.raises(RunChanged, match=r"corpus\.sources\.a\.replay"):
        submit(a_job(tmp_path / "one", MORE, unweighted | {"a": {"path": "a.txt", "replay": True}}))
    submit(a_job(tmp_path / "one", MORE, SOURCES | {"a": SOURCES["a"] | {"replay": True}}))
    unique = {"dedup": "exact"}
    finished(a_job(tmp_path / "unique", corpus=unique))
    with pytest.raises(RunChanged, match="with dedup, a new source would change"):
        submit(a_job(tmp_path / "unique", MORE, WITH_C, corpus=unique))


def test_only_a_finished_run_is_extended(tmp_path: Path) -> None:
    with pytest.raises(RunChanged, match=r"goes on with a finished run, and r is none"):
        submit(a_job(tmp_path, MORE))
    assert not (tmp_path / "r").exists()
    submit(a_job(tmp_path), STEPS - 1)
    with pytest.raises(RunChanged, match="the run is at step 3 of 4; let it end first"):
        submit(a_job(tmp_path, MORE))
    finished(a_job(tmp_path / "lost")).data_file.unlink()
    with pytest.raises(RunChanged, match="cannot be extended"):
        submit(a_job(tmp_path / "lost", MORE, WITH_C))


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"extend": {"max_tokens": 0}}, "greater than 0"),
        ({"train": {"max_steps": None, "epochs": 2}, "sources": {"a": {"path": "a"}}}, "a run of epochs"),
        ({"train": {"max_steps": None}, "stages": [{"block_size": 32, "max_tokens": 9}]}, "with stages"),
        ({"tune": {"search": {"train.lr": {"grid": [1e-4]}}}}, "only a finished run is extended"),
        ({"extend": {**MORE, "rewarm": False}}, "nothing would be learned"),
    ],
)
def test_what_an_extension_cannot_be_is_refused_by_the_job_alone(
    tmp_path: Path, job: dict[str, Any], says: str
) -> None:
    with pytest.raises(JobError, match=says):
        a_job(tmp_path, **({"extend": MORE} | job))
