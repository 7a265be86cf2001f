import io
import re
import time
from typing import Any

from rich.console import Console

from raydist.track.humanize import duration, number
from raydist.track.progress import Elapsed, Lines, LiveView, make_view


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def train(step: int, **more: Any) -> dict[str, Any]:
    figures = {"tokens_per_second": 1234.5, "data_wait_seconds": 0.01, "step_seconds": 2.0, "mfu": None}
    return (
        {"kind": "train", "step": step, "loss": 4.5, "learning_rate": 3e-4, "memory_bytes": 2**30}
        | figures
        | more
    )


def evaluation(step: int, perplexity: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "source": "web", "perplexity": perplexity, "bits_per_byte": 1.0}


def test_without_a_terminal_lines_are_plain_and_one_per_record() -> None:
    stream = io.StringIO()
    with make_view(stream) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 40})
        progress.phase("training", "2 workers")
        for record in (evaluation(0, 4012.0), train(10), train(20, loss=None, mfu=0.41)):
            progress.record(record)
        progress.message("\x1b[31mred\x1b[0m \r\x07[markup]")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())
    rest = "data wait 0.5%  memory 1.1 GB  lr 3.0e-04"
    assert stream.getvalue().splitlines() == [
        "starting",
        "training: 2 workers",
        "eval  step 0  web  perplexity 4,012",
        f"step 10/40  loss 4.500  1,234 tokens/s  MFU n/a  {rest}  ETA 1:00",
        f"step 20/40  loss n/a  1,234 tokens/s  MFU 41%  {rest}  ETA 0:40",
        "red [markup]",
    ]


def test_plain_lines_of_preparation_are_bounded_and_the_last_is_shown() -> None:
    now, lines = 0.0, list[str]()
    with Lines(lines.append, clock=lambda: now) as progress:
        for done in range(1, 101):
            now += 0.125
            progress.prepare(done, 100, done * 3, done * 1000)
    assert lines == [
        "starting",
        "slice 1/100  3 documents  1,000 tokens",
        "slice 41/100  123 documents  41,000 tokens",
        "slice 81/100  243 documents  81,000 tokens",
        "slice 100/100  300 documents  100,000 tokens",
    ]


def test_the_end_is_expected_by_recent_steps_and_again_after_a_resume() -> None:
    stream = io.StringIO()
    with make_view(stream) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 100})
        for step in range(1, 31):
            progress.record(train(step, step_seconds=60.0 if step <= 15 else 1.0))
        progress.record({"kind": "resume", "step": 20, "world_size": 1})
        progress.record(train(21, step_seconds=10.0))
    lines = stream.getvalue().splitlines()
    assert lines[30].endswith("ETA 1:10")
    assert lines[31] == "resumed at step 20 with 1 worker"
    assert lines[32].endswith("ETA 13:10")


def test_bad_steps_and_what_became_of_them_are_lines() -> None:
    said: list[str] = []
    view = Lines(said.append)
    documents = [{"source": "web", "file": "a.txt", "row": 7}, {"source": "web", "file": "a.txt", "row": 8}]
    skip = {"kind": "skip", "step": 12, "reason": "the loss is nan", "documents": documents}
    skip |= {"first_sample": 88, "end_sample": 96, "more_documents": 3}
    view.record({**skip, "action": "skipped"})
    view.record({**skip, "action": "recorded", "documents": []})
    view.record({**skip, "action": "rolled back", "back_to": 10, "skipped_from": 80})
    first = "the loss is nan (web: a.txt, row 7 and 4 more documents)"
    assert said == [
        f"step 12 was skipped: {first}",
        "step 12 is bad, and was trained: the loss is nan (and 3 more documents)",
        f"step 12 was skipped: {first}; the run goes back to step 10 and skips all samples since",
    ]


def test_what_was_tried_for_micro_batches_is_shown() -> None:
    stream = io.StringIO()
    tries = [{"sequences": n, "block_size": 2048, "bytes": peak} for n, peak in ((24, 61e9), (48, None))]
    begin = {"kind": "start", "step": 0, "micro_batch_size": 24}
    with make_view(stream) as progress:
        progress.record({**begin, "micro_batches_tried": tries, "device_bytes": 79.6e9})
        progress.record({**begin, "micro_batch_not_tried": "the ranks would wait"})
        progress.record(begin)
    assert stream.getvalue().splitlines()[1:] == [
        "micro batches of 24 sequences, tried 24 (61 GB), 48 (out of memory) of 79.6 GB",
        "micro batches of 24 sequences, not tried for size: the ranks would wait",
    ]


def test_a_terminal_shows_the_figures_live(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with make_view(stream, name="demo") as progress:
        progress.record({"kind": "start", "step": 0, "steps": 40})
        progress.phase("training")
        for record in (evaluation(0, 4012.0), train(10), evaluation(10, 45.2)):
            progress.record(record)
        progress.message("[not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for part in (
        "demo training",
        "step 10/40",
        "4.500",
        "MFU n/a",
        "4,012 → 45.20",
        "-98.9 %",
        "[not markup]",
    ):
        assert part in text


def on_screen(stream: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_resumed_run_is_compared_with_its_first_evaluation(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    before = [{**evaluation(0, 4012.0), "attempt": 1}, {**evaluation(10, 80.0), "attempt": 1}]
    with make_view(stream, name="demo") as progress:
        progress.history(before)
        progress.record({"kind": "resume", "step": 10, "steps": 40, "why": "a worker was lost"})
        progress.record(evaluation(20, 45.2))
    assert "4,012 → 45.20  -98.9 %" in on_screen(stream)
    assert "resumed at step 10 with 1 worker: a worker was lost" in on_screen(stream)


def test_each_phase_is_shown_and_the_lines_of_steps_stay(monkeypatch: Any) -> None:
    stream = Terminal()
    view = LiveView(Console(file=stream, force_terminal=True, width=200), "demo")
    with view:
        for phase, done, total, shown in (
            ("packing", 3, 12, ("demo packing", "3/12 shards")),
            ("load", 0, 0, ("demo loading the model",)),
            ("evaluation", 1200, 4000, ("demo evaluating", "1,200/4,000 tokens")),
            ("steps", 7, 30, ("demo training", "step 7/30")),
            ("export", 0, 0, ("demo exporting",)),
        ):
            view.progress(phase, done, total)
            view._bar.refresh()
            assert all(part in on_screen(stream) for part in shown)
        view.record({"kind": "start", "step": 0, "steps": 30})
        for step in (10, 20, 30):
            view.record(train(step))
    assert all(f"step {step}/30  loss 4.500" in on_screen(stream) for step in (10, 20, 30))


def test_the_clock_of_a_phase_goes_on_when_all_of_it_is_done(monkeypatch: Any) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=Terminal(), force_terminal=True, width=100)
    view = LiveView(console)
    view.progress("steps", 30, 30)
    now = 190.0
    view.progress("evaluation", 0, 10)
    (task,) = view._bar.tasks
    assert Elapsed().render(task).plain == "0:00"
    now = 200.0
    view.progress("steps", 30, 30)
    (task,) = view._bar.tasks
    assert task.finished and Elapsed().render(task).plain == "1:40"


def test_lines_tell_of_phases_that_last(monkeypatch: Any) -> None:
    now, lines = 0.0, list[str]()
    with Lines(lines.append, clock=lambda: now) as progress:
        for phase, done, total, seconds in (
            ("load", 0, 0, 9), ("evaluation", 5, 100, 1), ("steps", 1, 9, 9), ("steps", 2, 9, 9),
            ("evaluation", 10, 100, 3), ("evaluation", 50, 100, 3), ("evaluation", 90, 100, 1),
            ("export", 0, 0, 60), ("export", 0, 0, 0),
        ):  # fmt: skip
            progress.progress(phase, done, total)
            now += seconds
    assert lines == ["starting", "loading the model", "evaluating  90/100 tokens", "exporting"]


def test_a_terminal_can_have_plain_lines(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with make_view(stream, plain=True) as progress:
        progress.message("hello")
    assert stream.getvalue() == "starting\nhello\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: Any) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with make_view(stream) as progress:
        progress.message("hello")
    assert stream.getvalue() == "starting\nhello\n"


def test_numbers_and_durations() -> None:
    assert [number(v) for v in (None, float("nan"), 4012.3, 45.211, 3.14159)] == [
        "n/a", "n/a", "4,012", "45.21", "3.142",
    ]  # fmt: skip
    assert [duration(s) for s in (5, 62, 3662, 183840)] == ["0:05", "1:02", "1:01:02", "2 d 03:04"]
