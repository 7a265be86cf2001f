"""The commands that take a run, on folders as runs leave them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from raydist import files
from raydist.cli import group, main
from raydist.folder import RunFolder
from raydist.sealed import append_sealed


def make_run(storage: Path, name: str, state: str, steps: int = 3, **status: Any) -> RunFolder:
    folder = RunFolder(storage / name)
    folder.mark("run")
    folder.write_job(f"name: {name}\n")
    for record in records(steps):
        append_sealed(folder.metrics_file, record)
    files.write_text(folder.checkpoints / "step-00000002" / "COMMIT.json", "{}")
    (folder.checkpoints / "step-00000003").mkdir()
    folder.set_status(state, **status)
    return folder


def records(steps: int) -> list[dict[str, Any]]:
    figures = {"tokens_per_second": 10.0, "step_seconds": 1.0, "data_wait_seconds": 0.0, "mfu": None}
    figures |= {"memory_bytes": 1e9, "learning_rate": 1e-3}
    start = {"kind": "start", "step": 0, "steps": 4, "world_size": 2, "attempt": 1, "attention": "sdpa"}
    evaluations = [
        {"kind": "eval", "step": step, "source": "web", "perplexity": perplexity, "attempt": 1}
        for step, perplexity in ((0, 800.0), (steps, 40.0))
    ]
    train = [
        {"kind": "train", "step": n, "loss": 7.0 - n, "tokens_seen": 100 * n, "attempt": 1, **figures}
        for n in range(1, steps + 1)
    ]
    seconds = {"start": 5.25, "first_step": 0.5, "steps": 1234.5}
    phases = {"kind": "phases", "step": steps, "attempt": 1, "seconds": seconds}
    return [start, evaluations[0], *train, evaluations[1], phases]


def run(*arguments: str) -> Result:
    """Standard output and error, and the exit status, as a shell sees them."""
    return CliRunner().invoke(group, list(arguments))


def test_runs_are_listed_the_newest_first_and_a_dead_drivers_is_interrupted(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", "finished", steps=4)
    earlier = {**first.status(), "since": "2026-01-01T00:00:00+00:00"}
    files.write_json(first.status_file, earlier)
    second = make_run(tmp_path, "second", "training")
    with second.lease():
        told = run("ls", "--storage", str(tmp_path)).output.splitlines()
    assert told[0].split() == ["NAME", "STATE", "STEP", "LOSS", "SINCE"]
    assert told[1].split()[:4] == ["second", "training", "3/4", "4"]
    assert told[2].split()[:4] == ["first", "finished", "4/4", "3"]
    listed = orjson.loads(run("ls", "--storage", str(tmp_path), "--json").output)
    assert [(row["name"], row["state"]) for row in listed] == [
        ("second", "interrupted"),
        ("first", "finished"),
    ]
    empty = run("ls", "--storage", str(tmp_path / "first"))
    assert empty.exit_code == 0 and f"no runs in {tmp_path}" in empty.stderr


def test_status_says_how_a_run_stands(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "web", "failed", error="step 3: at s3://me:secret@host", kind="TrainingError")
    told = run("status", "web", "--storage", str(tmp_path)).output
    assert told.startswith("web: failed since ") and "step 3: at s3://***@host" in told
    for fact in (
        "step         3/4",
        "tokens       300",
        "web: 800 -> 40",
        "attention    sdpa\n",
        "tokens/s     10\n",
        "time         start 5.2 s, first step 0.5 s, steps 1,234.5 s\n",
        "checkpoints  step 2\n",
        str(folder.path),
    ):
        assert fact in told, told
    known = orjson.loads(run("status", str(folder.path), "--json").output)
    assert known["perplexity"] == {"web": {"first": 800.0, "last": 40.0}}
    assert known["seconds"]["first_step"] == 0.5 and known["mfu"] is None
    assert (known["attempts"], known["checkpoints"], known["model"]) == (1, [2], None)


def test_logs_end_with_the_status_of_the_run(tmp_path: Path) -> None:
    storage = ("--storage", str(tmp_path))
    make_run(tmp_path, "good", "finished")
    good = run("logs", "good", *storage)
    assert good.exit_code == 0 and good.stdout.splitlines()[1].startswith("step 1/4  loss 6.000  10 tokens/s")
    assert good.stdout.splitlines()[-1] == "eval  step 3  web  perplexity 40.00"
    make_run(tmp_path, "bad", "failed", error="the loss is nan", kind="TrainingError")
    bad = run("logs", "bad", *storage)
    assert bad.exit_code == 7 and bad.stderr == "run bad failed: the loss is nan\n"
    make_run(tmp_path, "halted", "stopped")
    assert run("logs", "halted", *storage).exit_code == 130


def test_logs_follow_a_run_to_its_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", "training", steps=2)
    last = records(3)[-3]

    def end() -> None:
        append_sealed(folder.metrics_file, last)
        folder.set_status("finished")

    with folder.lease():
        timer = threading.Timer(1.0, end)
        timer.start()
        told = run("logs", "live", "--follow", "--storage", str(tmp_path))
        timer.join()
    assert told.exit_code == 0 and "step 3/4" in told.stdout.splitlines()[-1]


def test_a_dead_drivers_run_cannot_be_stopped_or_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "dead", "training")
    for arguments in (["stop", "dead"], ["logs", "dead", "--follow"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--storage", str(tmp_path)])
        assert ended.value.code == 6 and "interrupted" in capsys.readouterr().err


def test_looking_at_runs_needs_no_ray_and_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path, "good", "finished")
    for arguments in (["ls"], ["status", "good"], ["logs", "good"]):
        code = (
            "import sys; from raydist.cli import group\n"
            f"group.main({[*arguments, '--storage', str(tmp_path)]!r}, standalone_mode=False)\n"
            "print({'ray', 'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.endswith("set()\n")
