"""A checkpoint counts when every byte of it verifies, and not before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydist.errors import CheckpointError
from raydist.files import measure, read_json, read_jsonl, write_json
from raydist.folder import RunFolder
from raydist.training import checkpoint
from raydist.training.checkpoint import Commit, Counts, Skipped


def write(
    run: Path,
    step: int,
    loss: float | None = None,
    content: bytes = b"state",
    guards: dict[str, Any] | None = None,
) -> Commit:
    folder = RunFolder(run)
    path = folder.checkpoint(step)
    checkpoint.begin(path)
    (path / "weights.safetensors").write_bytes(content)
    evals = {} if loss is None else {"a": {"eval_loss": loss + 1}, "b": {"eval_loss": loss - 1}}
    position: dict[str, Any] = {"step": step, "samples": step * 4, "seen": Counts(step, 1, 2), "evals": evals}
    position["guards"] = guards
    files = {"weights.safetensors": measure(path / "weights.safetensors")}
    made = Commit(
        path=path, feed="feed", attempt=1, world_size=1, ledger=f"1-{step}", files=files, **position
    )
    return checkpoint.commit(folder, made, resumed_from=0, since=next(checkpoint.commits(folder), None))


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
    checkpoint.go_on_from(RunFolder(tmp_path))
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


# --- what was skipped


def test_ranges_that_touch_are_one() -> None:
    skipped = Skipped().add(8, 12, steps=1, tokens=40).add(12, 16, steps=1, tokens=30)
    skipped = skipped.add(20, 24, steps=1, tokens=1)
    assert skipped == Skipped(3, ((8, 16), (20, 24)), 71)
    assert (skipped.samples, skipped.holds(15, 17), skipped.holds(16, 20)) == (12, True, False)
    assert Skipped.from_json(json.loads(json.dumps(skipped.to_json()))) == skipped


def test_what_was_not_skipped_is_not_mentioned(tmp_path: Path) -> None:
    done = write(tmp_path, 5)
    (line,) = read_jsonl(tmp_path / "ledger.jsonl")
    assert not {"skipped", "guards"} & {*read_json(done.path / "COMMIT.json"), *line}


def test_steps_that_fp16_skipped_in_an_older_version_are_known_from_its_scale(tmp_path: Path) -> None:
    done = write(tmp_path, 5)
    write_json(done.path / "loss_scale.json", {"scale": 2.0, "skipped": 2, "good": 3, "bad": 0})
    found = checkpoint.read_commit(done.path)
    assert found.skipped == Skipped(steps=2) and found.updates == 3
    assert checkpoint.disagreement(RunFolder(tmp_path), found) is None


def test_the_checkpoint_that_skipped_steps_lead_back_to_is_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step, guards={"back_to": 5 if step < 20 else 10, "in_a_row": 0})
    checkpoint.retain(RunFolder(tmp_path), 1)
    assert [c.step for c in checkpoint.commits(RunFolder(tmp_path))] == [20, 10]


# --- what was altered


def alter(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"samples": 40', '"samples": 44'),
        ('"step": 10', '"step": 11'),
        ('"tokens": 10', '"tokens": 18'),
        ('"feed": "feed"', '"feed": "deed"'),
        ('"files"', '"filer"'),
        ('"eval_loss": 3.0', '"eval_loss": 1.0'),
    ],
)
def test_a_commit_that_was_altered_is_passed_over(tmp_path: Path, old: str, new: str) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10, loss=2.0)
    alter(newer.path / "COMMIT.json", old, new)
    said: list[str] = []
    assert checkpoint.go_on_from(RunFolder(tmp_path), said.append) == older
    assert len(said) == 1 and f"COMMIT.json is damaged ({newer.path / 'COMMIT.json'})" in said[0]


def test_a_commit_in_the_folder_of_another_step_is_passed_over(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    newer.path.rename(newer.path.with_name("step-00000012"))
    (tmp_path / "checkpoints" / "step-00000099").write_bytes(b"a file")
    said: list[str] = []
    assert checkpoint.go_on_from(RunFolder(tmp_path), said.append) == older
    assert "COMMIT.json is of another checkpoint" in said[0]


def of_last_week(commit: Commit) -> None:
    """As COMMIT.json was before it had a checksum and a copy of its line."""
    raw = read_json(commit.path / "COMMIT.json")
    write_json(commit.path / "COMMIT.json", {k: v for k, v in raw.items() if k not in ("checksum", "line")})


@pytest.mark.parametrize("old", ['"samples": 40', '"tokens": 10'])
def test_a_commit_without_a_checksum_is_compared_with_the_ledger(tmp_path: Path, old: str) -> None:
    commits = [write(tmp_path, step) for step in (5, 10)]
    for each in commits:
        of_last_week(each)
    unchained = [{k: v for k, v in line.items() if k != "before"} for line in read_jsonl(ledger_of(tmp_path))]
    ledger_of(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in unchained))
    assert checkpoint.newest_valid(RunFolder(tmp_path)).step == 10  # type: ignore[union-attr]
    alter(commits[1].path / "COMMIT.json", old, old + "0")
    said: list[str] = []
    found = checkpoint.go_on_from(RunFolder(tmp_path), said.append)
    assert found is not None and found.step == 5 and "disagree" in said[0]
    newer = write(tmp_path, 15)  # the chain begins at what was there
    assert checkpoint.go_on_from(RunFolder(tmp_path)) == newer
    ledger_of(tmp_path).unlink()
    newer.path.joinpath("COMMIT.json").unlink()
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl and COMMIT\.json of step 5 disagree"):
        checkpoint.go_on_from(RunFolder(tmp_path))


def ledger_of(run: Path) -> Path:
    return run / "ledger.jsonl"


def without_last(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda content: content + b'{"id": "1-20", "prev',
    "torn last": lambda content: content[:-30],
    "cut": without_last,
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content.replace(b'"tokens":5', b'"tokens":7', 1),
    "line lost": lambda content: b"".join(content.splitlines(keepends=True)[1:]),
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "binary": lambda content: b"\xff\n\0\n" * 50,
    "foreign": lambda content: b'[1, 2]\n{"id": 5}\n',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_made_again_where_the_commits_hold_its_lines(tmp_path: Path, damage: str) -> None:
    for step in (5, 10, 15):
        newest = write(tmp_path, step)
    ledger, before = ledger_of(tmp_path), ledger_of(tmp_path).read_bytes()
    ledger.write_bytes(DAMAGES[damage](before))
    said: list[str] = []
    assert checkpoint.go_on_from(RunFolder(tmp_path), said.append) == newest
    assert ledger.read_bytes() == before and len(said) == 1 and "ledger.jsonl" in said[0]
    assert checkpoint.go_on_from(RunFolder(tmp_path), said.append) == newest and len(said) == 1
    ledger.unlink()
    checkpoint.go_on_from(RunFolder(tmp_path), said.append)
    assert ledger.read_bytes() == before and "was missing" in said[1]


@pytest.mark.parametrize("damage", ["flipped", "empty", "zeros"])
def test_a_ledger_that_lost_lines_for_good_is_refused_until_the_user_says_so(
    tmp_path: Path, damage: str
) -> None:
    for step in (5, 10, 15, 20):
        newest = write(tmp_path, step)
    checkpoint.retain(RunFolder(tmp_path), 2)
    ledger = ledger_of(tmp_path)
    ledger.write_bytes(DAMAGES[damage](ledger.read_bytes()))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl has lost lines") as refused:
        checkpoint.go_on_from(RunFolder(tmp_path))
    assert '{"lost":true}' in refused.value.fix and (newest.path / "COMMIT.json").exists()
    ledger.write_text('{"lost":true}\n')
    assert checkpoint.go_on_from(RunFolder(tmp_path)) == newest
    assert [line.get("id") for line in read_jsonl(ledger)] == [None, "1-15", "1-20"]
    newer = write(tmp_path, 25)
    assert checkpoint.go_on_from(RunFolder(tmp_path)) == newer


def test_void_lines_are_part_of_the_chain(tmp_path: Path) -> None:
    """An attempt that died before its COMMIT left one; the next attempt's lines follow it."""
    write(tmp_path, 5)
    (write(tmp_path, 10).path / "COMMIT.json").unlink()
    newest, before = write(tmp_path, 15), ledger_of(tmp_path).read_bytes()
    said: list[str] = []
    assert checkpoint.go_on_from(RunFolder(tmp_path), said.append) == newest and not said
    assert ledger_of(tmp_path).read_bytes() == before
