"""Ranks give signs of life; those that hang write their stacks; a driver says so and ends them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from raydist import files
from raydist.errors import CheckpointError, Stopped, TrainingError, WorkerLost
from raydist.folder import RunFolder
from raydist.run import hang
from raydist.run.hang import HangWatch
from raydist.track import silence as silence_module
from raydist.track.silence import MOST_SECONDS, Silence, silence, silence_now
from raydist.training.beat import Beat, ask_for_stacks, beating, read_beats
from raydist.training.phases import Phases

EVERY = 0.05


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_beats_while_it_lives_and_leaves_nothing(tmp_path: Path) -> None:
    phases = Phases("load")
    with beating(tmp_path / "ranks", 3, phases, every=EVERY):
        until(lambda: read_beats(tmp_path / "ranks"))
        (beat,) = read_beats(tmp_path / "ranks")
        assert (beat.rank, beat.pid, beat.phase) == (3, os.getpid(), "load")
        phases.begin("steps")
        until(lambda: read_beats(tmp_path / "ranks")[0].phase == "steps")
    assert not list((tmp_path / "ranks").iterdir())


def test_progress_is_a_phase_a_step_or_being_heard() -> None:
    now = [0.0]
    phases = Phases("steps", clock=lambda: now[0])
    for progress in (lambda: phases.begin("steps"), phases.heard):
        now[0] += 5
        assert phases.quiet_seconds() == 5
        progress()
        assert phases.quiet_seconds() == 0
    assert phases.of("steps") == 10


def waits_in_a_function_of_this_name() -> None:
    ctypes.PyDLL(None).usleep(int(30e6 * EVERY))  # holds the GIL: no other thread of Python runs


def test_stacks_are_written_on_request_and_where_something_holds_the_gil(tmp_path: Path) -> None:
    with beating(tmp_path, 0, Phases("steps"), every=EVERY):
        until(lambda: read_beats(tmp_path))
        ask_for_stacks(tmp_path)
        until(lambda: (tmp_path / "rank-0.txt").stat().st_size)
        asked = (tmp_path / "rank-0.txt").read_text()
        assert "test_stacks_are_written" in asked and "waits_in" not in asked
        waits_in_a_function_of_this_name()
    assert "waits_in_a_function_of_this_name" in (tmp_path / "rank-0.txt").read_text()


def a_beat(rank: int, quiet: float, age: float = 0.0, phase: str = "steps") -> Beat:
    return Beat(rank, 1, "h", 0.0, phase, quiet, 1000.0 - age)


def write(folder: RunFolder, *beats: Beat) -> None:
    for beat in beats:
        files.write_json(folder.ranks(1) / f"rank-{beat.rank}.json", asdict(beat))


@pytest.mark.parametrize(
    ("seconds", "usual", "is_long"),
    [(29, 0.1, False), (31, 0.1, True), (90, 10, False), (110, 10, True), (250, 100, True), (250, 130, False),
     (239, None, False), (241, None, True)],
)  # fmt: skip
def test_how_long_is_long_depends_on_a_step(seconds: float, usual: float | None, is_long: bool) -> None:
    assert Silence(seconds, usual, "steps", (), ()).is_long == is_long
    assert MOST_SECONDS < 300  # the collectives' own limit


def test_the_rank_with_the_latest_progress_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert silence(folder, 1, []) is None
    write(folder, a_beat(0, 50), a_beat(1, 2, age=60))
    found = silence(folder, 1, [0.2, 0.3, 9], now=1000.0)
    assert found is not None and (found.seconds, found.usual, found.mute) == (50, 0.3, (1,))
    told = found.text(Path("x/ranks"))
    assert told == (
        "no step for 0:50, and one takes 0.3 s; rank 1 gave no sign of life for 15 s: stopped, or the host"
        " is gone; stacks in x/ranks"
    )
    write(folder, a_beat(0, 300, phase="evaluation"), a_beat(1, 301, phase="evaluation"))
    found = silence(folder, 1, [0.2], now=1000.0)
    assert found is not None and found.text(Path("x")).startswith("no progress for 5:00 in evaluation;")


RANK = """
import sys, time
from pathlib import Path
from raydist.training.beat import beating
from raydist.training.phases import Phases
with beating(Path(sys.argv[1]), int(sys.argv[2]), Phases("steps"), every=0.05):
    print(flush=True)
    time.sleep(100)
"""


def test_a_stopped_rank_is_named_and_all_are_ended_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(hang, "STACKS_SECONDS", 0.5)
    monkeypatch.setattr(silence_module, "MUTE_SECONDS", 0.5)
    folder, said = RunFolder(tmp_path), list[str]()
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(folder.ranks(1)), str(n)], stdout=subprocess.PIPE)
        for n in range(2)
    ]
    for process in ranks:
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
    until(lambda: len(read_beats(folder.ranks(1))) == 2)
    ranks[1].send_signal(signal.SIGSTOP)
    watch = HangWatch(folder, 1, 2.0, said.append)
    watch.record({"kind": "train", "step_seconds": 0.1})

    def looked() -> bool:
        watch.look()
        return bool(watch.ended)

    until(looked)
    assert [process.wait() for process in ranks] == [-signal.SIGKILL] * 2
    assert '"<string>", line' in (folder.ranks(1) / "rank-0.txt").read_text()
    assert not (folder.ranks(1) / "rank-1.txt").stat().st_size  # a stopped process cannot answer
    assert len(said) == 1 and "rank 1 gave no sign of life" in said[0]
    lost = watch.explained(TrainingError("process group"))
    assert isinstance(lost, WorkerLost) and lost.what.startswith("the workers hung: no step for 0:0")
    assert isinstance(watch.explained(Stopped("stopped")), Stopped)
    other = CheckpointError("damaged")
    assert HangWatch(folder, 1, None, said.append).explained(other) is other
    assert silence_now(folder) is None  # 2 s are not long
