"""A checkpoint counts when every byte of it verifies, and not before."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydist.errors import CheckpointError
from raydist.files import read_jsonl
from raydist.folder import RunFolder
from raydist.training import checkpoint
from raydist.training.checkpoint import Commit, Counts


def write(run: Path, step: int, loss: float | None = None, content: bytes = b"state") -> Commit:
    folder = RunFolder(run)
    path = folder.checkpoint(step)
    checkpoint.begin(path)
    (path / "weights.safetensors").write_bytes(content)
    evals = {} if loss is None else {"a": {"eval_loss": loss + 1}, "b": {"eval_loss": loss - 1}}
    position = {"step": step, "samples": step * 4, "seen": Counts(step, 1, 2), "evals": evals}
    made = Commit(path=path, feed="feed", attempt=1, world_size=1, ledger=f"1-{step}", **position)
    return checkpoint.commit(folder, made, resumed_from=0, since=None)


def test_a_commit_names_its_files_and_its_ledger_line(tmp_path: Path) -> None:
    done = write(tmp_path, 5, loss=2.0)
    assert checkpoint.newest_valid(RunFolder(tmp_path)) == done
    assert done.files is not None
    assert done.files["weights.safetensors"]["size"] == 5
    assert done.eval_loss == 2.0
    [line] = read_jsonl(tmp_path / "ledger.jsonl")
    assert line["id"] == done.ledger
    assert (line["samples"], line["tokens"], line["eos"], line["padding"]) == ([0, 20], 5, 1, 2)


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "torn commit", "no commit"])
def test_damage_is_detected_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    state, record = newer.path / "weights.safetensors", newer.path / "COMMIT.json"
    match damage:
        case "altered":
            state.write_bytes(b"stale")
        case "cut":
            state.write_bytes(b"stat")
        case "missing":
            state.unlink()
        case "torn commit":
            record.write_bytes(record.read_bytes()[:40])
        case "no commit":
            record.unlink()
    told: list[CheckpointError] = []
    assert checkpoint.newest_valid(RunFolder(tmp_path), told.append) == older
    assert len(told) == (damage != "no commit")


def test_the_next_writer_clears_half_written_and_damaged_ones(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    (newer.path / "weights.safetensors").write_bytes(b"stale")
    half = RunFolder(tmp_path).checkpoint(15)
    checkpoint.begin(half)
    (half / "weights.safetensors").write_bytes(b"half")
    with (tmp_path / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"id": "1-15", "to')
    checkpoint.tidy(RunFolder(tmp_path), checkpoint.newest_valid(RunFolder(tmp_path)))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["damaged-step-00000010", older.path.name]
    assert (tmp_path / "ledger.jsonl").read_bytes().endswith(b"}\n")
    assert [line["id"] for line in read_jsonl(tmp_path / "ledger.jsonl")] == ["1-5", "1-10"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((5, 3.0), (10, 1.0), (15, None), (20, 2.0), (25, None)):
        write(tmp_path, step, loss)
    checkpoint.retain(RunFolder(tmp_path), 2)
    assert [c.step for c in checkpoint.commits(RunFolder(tmp_path))] == [25, 20, 10]
    assert checkpoint.best(RunFolder(tmp_path)).step == 10  # type: ignore[union-attr]


def test_a_folder_that_is_written_again_starts_empty(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).checkpoint(5)
    checkpoint.begin(path)
    (path / "left-over").touch()
    done = write(tmp_path, 5)
    assert done.files is not None
    assert list(done.files) == ["weights.safetensors"]
