import json
from pathlib import Path
from typing import Any

from raydist.folder import RunFolder
from raydist.track.humanize import phases
from raydist.track.records import Tail, effective, figures, phase_seconds, supersede


def train(step: int, attempt: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "attempt": attempt, "loss": float(step), **more}


def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.poll() == []
    whole = json.dumps(train(1, 1)).encode() + b"\n"
    path.write_bytes(whole + whole[:9])
    assert [r["step"] for r in tail.poll()] == [1]
    assert tail.poll() == []
    path.write_bytes(whole + whole + whole)
    assert len(tail.poll()) == 2
    assert Tail(path, tail.offset).poll() == []


def test_a_line_torn_by_a_killed_writer_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "tra\n' + json.dumps(train(2, 2)).encode() + b"\n\n[1]\n")
    assert [r["step"] for r in Tail(path).poll()] == [2]


def test_a_file_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(json.dumps(train(1, 1, note="x" * 99)) + "\n")
    tail.poll()
    path.write_text(json.dumps(train(7, 1)) + "\n")
    assert [r["step"] for r in tail.poll()] == [7]


def test_a_resume_takes_back_the_later_steps_of_earlier_attempts() -> None:
    lost = [
        {"kind": "start", "step": 0, "attempt": 1},
        *(train(step, 1) for step in (10, 20, 30)),
        {"kind": "eval", "step": 30, "source": "a", "attempt": 1},
        {"kind": "incident", "step": 30, "what": "a worker was lost", "attempt": 1},
    ]
    resumed = [{"kind": "resume", "step": 10, "attempt": 2}, train(25, 2)]
    history = supersede([*lost, *resumed])
    assert [(r["step"], r["attempt"]) for r in history if r["kind"] == "train"] == [(10, 1), (25, 2)]
    assert [r["kind"] for r in history] == ["start", "train", "incident", "resume", "train"]


def test_the_newest_attempt_wins_in_whatever_order_records_arrive(tmp_path: Path) -> None:
    resume = {"kind": "resume", "step": 10, "attempt": 2}
    records = [train(10, 1), resume, train(20, 2, loss=2.0), train(20, 1, loss=1.0), train(30, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    kept = [r for r in effective(RunFolder(tmp_path)) if r["kind"] == "train"]
    assert [(r["step"], r["attempt"]) for r in kept] == [(10, 1), (20, 2)]


def test_sources_of_one_step_are_kept_apart() -> None:
    both = [{"kind": "eval", "step": 5, "source": name, "attempt": 1} for name in ("a", "b")]
    assert supersede([*both, both[0]]) == [both[1], both[0]]


def test_phases_of_all_attempts_add_up_in_their_order() -> None:
    first = {"prepare": 5.0, "thinking": 0.5, "steps": 1000.0, "load": 1.0}
    second = {"load": 1.5, "first_step": 2.0, "steps": 500.25, "export": 1.0}
    written = [
        train(1, 1),
        {"kind": "phases", "step": 40, "attempt": 1, "seconds": first},
        {"kind": "resume", "step": 30, "attempt": 2},
        {"kind": "phases", "step": 60, "attempt": 2, "seconds": second},
    ]
    total = phase_seconds(written)
    assert list(total) == ["prepare", "load", "first_step", "steps", "export", "thinking"]
    assert phases(total) == (
        "prepare 5.0 s, load 2.5 s, first step 2.0 s, steps 1,500.2 s, export 1.0 s, thinking 0.5 s"
    )
    assert phase_seconds(written[:1]) == {} and phases({}) == ""
    assert figures(written[1]) == {}  # trackers have no use for it
