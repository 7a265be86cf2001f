"""A finished run is submitted again with more tokens and a new source."""

from __future__ import annotations

from pathlib import Path

import pytest

import raydist
from raydist.cli import main
from raydist.track.records import effective, read_metrics
from tests.whole_run import (
    finish,
    folder_of,
    kill_everything,
    start,
    submit,
    wait_for_step,
    whole_job,
    write_corpus,
)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_a_new_source_and_survives_a_kill(tmp_path: Path) -> None:
    write_corpus(tmp_path / "words.jsonl")
    write_corpus(tmp_path / "more.jsonl", 300)
    job = whole_job(tmp_path / "words.jsonl", tmp_path / "runs")
    job["train"]["max_steps"] = 8
    assert submit(job)[0] == 0
    job["train"]["extend"] = {"max_tokens": 24 * 16 * 128, "optimizer": "reset"}
    job["corpus"]["sources"] = {
        "more": {"path": str(tmp_path / "more.jsonl"), "weight": 0.75},
        "words": {"path": str(tmp_path / "words.jsonl"), "weight": 0.25, "replay": True},
    }
    process, folder = start(job), folder_of(job)
    wait_for_step(folder, 17, process, attempt=2)
    kill_everything(process)
    process.communicate()
    status, output = finish(start(job))
    assert status == 0, output
    records = effective(folder)
    assert [r["step"] for r in records if "loss" in r] == [*range(1, 33)]
    evals = [(r["source"], r["step"]) for r in records if r["kind"] == "eval"]
    assert ("more", 8) in evals and ("more", 0) not in evals
    last = {r["source"]: r for r in records if r["kind"] == "eval" and r["step"] == 32}
    assert last["more"]["gain"] > 0 and "forgetting" in last["words"]
    assert {r["optimizer"] for r in read_metrics(folder) if r["kind"] == "segment"} == {"reset"}
    data = folder.data()
    audit = data["audit"]
    assert audit["n_in"] == sum(source["n_tokens"] for source in data["sources"].values())
    assert set(data["pins"]["logs"]) == {"words", "more"}
    assert "xtension from step 8 on: 24 steps" in folder.report.read_text()
    feed = raydist.open_feed(str(folder.path))
    assert [stage.start for stage in feed.stages] == [0, 128]
    for command in (["verify"], ["show", "--step", "20"]):
        with pytest.raises(SystemExit) as ended:
            main([command[0], str(folder.path), *command[1:]])
        assert ended.value.code == 0
    status, output = submit(job)
    assert status == 0 and "finished already" in output
    status, output = submit(job | {"seed": 1})
    assert status != 0 and "seed: 0 -> 1" in output
