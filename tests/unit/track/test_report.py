import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from raydist.folder import RunFolder
from raydist.track.humanize import short
from raydist.track.report import REWRITE_SECONDS, LiveReport, render, wall_seconds, write_report


def run_folder(run: Path, steps: int = 60) -> Path:
    """A run of two attempts: lost at step 40, resumed at 30."""
    run.mkdir()
    records: list[dict[str, Any]] = []
    for attempt, first, last in ((1, 0, 40), (2, 30, steps)):
        kind = "resume" if first else "start"
        begin = 1e9 + 1000 * attempt
        records.append(
            {
                "kind": kind,
                "step": first,
                "world_size": 2,
                "attempt": attempt,
                "time": begin,
                **BEGUN[attempt],
            }
        )
        for step in range(first + 1, last + 1):
            records.append(_train(step, attempt, begin + step - first))
        for step in range(first, last + 1, 20):
            records.append(_eval(step, attempt, begin + step - first))
    for attempt in (1, 2):
        seconds = {"load": 2.5, "first_step": 1.25, "steps": 700.0 * attempt}
        records.append({"kind": "phases", "step": 40, "attempt": attempt, "seconds": seconds})
    records.append({"kind": "incident", "what": "a <worker> was lost", "attempt": 1, "time": 1e9 + 1500})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "raydist-job.yaml").write_text(
        "name: <demo>\ntracking:\n  mlflow: http://ann:hunter2@tracking.example/\n"
    )
    (run / "status.json").write_text('{"state": "training", "since": "2026-01-01T00:00:00+00:00"}')
    (run / "data.json").write_text(json.dumps(DATA))
    return run


BEGUN: dict[int, dict[str, Any]] = {
    1: {"why": "first submission"},
    2: {
        "why": "a worker was lost (http://ann:pw@h died)",
        "device": "cuda",
        "device_name": "NVIDIA H100",
        "mixed_precision": "bf16",
        "attention": "flex",
        "compiled": True,
        "versions": {"python": "3.12", "torch": "2.9"},
    },
}


def _train(step: int, attempt: int, time: float) -> dict[str, Any]:
    loss = 9.0 * math.exp(-step / 30)
    rates = {"tokens_per_second": 9000.0, "data_wait_seconds": 0.01, "step_seconds": 1.0, "mfu": None}
    more = {"learning_rate": 1e-3, "grad_norm": 1.0, "samples": 8 * step, "tokens_seen": 2048 * step}
    place = {"kind": "train", "step": step, "attempt": attempt, "time": time}
    return {"loss": loss if step != 7 else None, "memory_bytes": 1} | place | rates | more


def _eval(step: int, attempt: int, time: float) -> dict[str, Any]:
    perplexity = 4000.0 * math.exp(-step / 10)
    counts = {"n_tokens": 100, "n_bytes": 300, "n_documents": 4}
    place = {"kind": "eval", "step": step, "source": "web $x$", "attempt": attempt, "time": time}
    return (
        {"eval_loss": math.log(perplexity), "perplexity": perplexity, "bits_per_byte": 1.5} | place | counts
    )


DATA = {
    "sources": {
        "web $x$": {
            "log": "f00d", "path": "/tokens/f00d", "n_documents": 41, "n_tokens": 200_000, "n_bytes": 812_345,
            "n_shards": 2, "n_quarantined": 3, "n_empty": 1, "held_out_documents": 4, "held_out_tokens": 100,
            "weight": None, "mean_tokens": 4878.0, "duplicate_documents": 7,
        }
    },
    "unique_share": 0.975,
    "packing": [{"block_size": 256, "strategy": "best_fit", "n_blocks": 790, "padding_share": 0.0123}],
    "audit": {
        "n_in": 200_000, "n_trained": 120_000, "n_held_out": 100, "n_left": 79_800, "n_repeated": 0,
        "n_duplicate": 100,
        "n_eos": 40, "n_padding": 96,
    },
    "sample": {"prompt": "if a <", "continuation": " b & c: </pre><script>"},
    "parameters": {"total": 7_345_664, "trainable": 7_345_664},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "demo")


def text_of(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>", "", page[page.index("<body>") :], flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_tells_the_whole_run(run: Path) -> None:
    page = write_report(RunFolder(run), state="finished").read_text()
    told = text_of(page)
    for part in (
        "finished",
        "122,880",
        "4,000 26.95 \N{MINUS SIGN}99.3 %",
        "120,000 trained, 60.0 %",
        "100 duplicate, 0.1 %",
        "79,800 left, 39.9 %",
        "4,878.0",
        "97.50 % of the documents are unique",
    ):
        assert part in told
    assert "Where the time went load first step steps 5.0 s 2.5 s 2,100.0 s" in told
    assert "MFU" not in told  # it is not known
    assert "Attempt 1 started with 2 workers: first submission" in told
    assert "Attempt 2 resumed at step 30 with 2 workers: a worker was lost (http://***@h died)" in told
    assert "790 blocks of 256 tokens, 1.23 % of them padding" in told
    assert page.count("<svg") == 6


SKIP = {
    "kind": "skip",
    "step": 12,
    "attempt": 1,
    "time": 1e9 + 1012,
    "action": "skipped",
    "reason": "the loss 9.1 is 12.0 deviations above 3, the median of 128 steps",
    "loss": 9.1,
    "first_sample": 88,
    "end_sample": 96,
    "documents": [{"source": "web", "file": f"{n}.txt", "row": n, "loss": 9.5} for n in range(7)],
    "more_documents": 1000,
    "stand_out": True,
}


def test_the_page_lists_bad_steps_and_their_documents(run: Path) -> None:
    assert "Bad steps" not in text_of(write_report(RunFolder(run)).read_text())
    back = {"step": 13, "action": "rolled back", "back_to": 10, "skipped_from": 80, "stand_out": False}
    with (run / "metrics.jsonl").open("a") as stream:
        for record in (SKIP, SKIP | back | {"documents": SKIP["documents"][:1], "more_documents": 0}):
            stream.write(json.dumps(record) + "\n")
    (run / "data.json").write_text(json.dumps(DATA | {"audit": DATA["audit"] | {"n_skipped": 500}}))
    told = text_of(write_report(RunFolder(run)).read_text())
    assert "Bad steps 2" in told and "500 skipped, 0.2 %" in told
    assert "12 88 to 95 skipped the loss 9.1 is 12.0 deviations above 3" in told
    assert "web: 0.txt, row 0; web: 1.txt, row 1;" in told and "; and 1,002 more" in told
    assert "rolled back to step 10" in told and "none; all of the batch: web: 0.txt, row 0" in told


def test_the_page_names_what_was_trained_and_on_what(run: Path) -> None:
    (run / "raydist-job.yaml").write_text(
        """
model: {base: org/small}
adapter: {method: lora, r: 8}
quantization: int4
corpus: {sources: {web: {path: ["a/*.parquet", "s3://key:pw@b/x"]}, books: {path: b.txt}}}
strategy: {name: zero, stage: 3, offload: cpu}
"""
    )
    told = text_of(render(RunFolder(run)))
    for part in (
        "Base org/small, a LoRA adapter of rank 8, the base frozen in int4",
        "Sources web ([&#34;a/*.parquet&#34;, &#34;s3://***@b/x&#34;]), books (b.txt)",
        "Devices 2 workers on NVIDIA H100 CUDA",
        "Precision bf16",
        "Strategy zero, stage 3, offloaded to host memory",
        "Attention flex, layers compiled",
        "Versions python 3.12, torch 2.9",
    ):
        assert part in told
    for damaged in (b"\0\0", b"model: [", b"- 1", b"\xff\xfe"):
        (run / "raydist-job.yaml").write_bytes(damaged)
        assert "Precision bf16" in text_of(render(RunFolder(run)))


def test_added_tokens_are_counted_apart_also_in_older_runs_which_have_no_bos(run: Path) -> None:
    assert "training read 40 end-of-document tokens and 96" in text_of(render(RunFolder(run)))
    counted = {**DATA, "audit": {**DATA["audit"], "n_bos": 30}}
    (run / "data.json").write_text(json.dumps(counted))
    told = text_of(render(RunFolder(run)))
    assert "training read 30 beginning-of-document tokens, 40 end-of-document tokens and 96" in told


def test_the_report_is_written_while_the_run_goes_on_but_not_all_the_time(run: Path) -> None:
    now = 0.0
    live = LiveReport(RunFolder(run), clock=lambda: now)
    folder, written = RunFolder(run), list[bool]()
    for now in (0.0, 5.0, REWRITE_SECONDS - 1, REWRITE_SECONDS, REWRITE_SECONDS + 2):
        folder.report.unlink(missing_ok=True)
        live.send([_train(1, 1, now)], int(now))
        written.append(folder.report.exists())
    assert written == [True, False, False, True, False] and live.offset == REWRITE_SECONDS + 2
    now, live.ended = 1e6, True
    live.send([], 0)
    assert not folder.report.exists()  # the last one says how the run ended, and is not replaced


def test_a_known_mfu_is_shown(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"mfu": null', '"mfu": 0.456'))
    assert "MFU 46 % of the devices&#39; peak, median" in text_of(render(RunFolder(run)))


def test_only_the_winning_attempt_is_drawn(run: Path) -> None:
    page = render(RunFolder(run))
    (curve,) = re.findall(r'id="learning-rate-series-learning_rate">\s*<path d="([^"]*)"', page)
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", curve)]
    assert xs == sorted(set(xs))


def test_what_a_run_holds_cannot_become_markup_or_leak(run: Path) -> None:
    page = render(RunFolder(run), error="GET http://bob:pw@host failed <img src=x>")
    assert "<script" not in page and "<img" not in page and "hunter2" not in page and "bob:pw" not in page
    assert "b &amp; c: &lt;/pre&gt;&lt;script&gt;" in page


def test_nothing_points_outside_the_page(run: Path) -> None:
    page = render(RunFolder(run))
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(ids)


def test_the_same_folder_gives_the_same_page(run: Path) -> None:
    assert re.sub(r"written .* UTC", "", render(RunFolder(run))) == re.sub(
        r"written .* UTC", "", render(RunFolder(run))
    )


def test_runs_that_hardly_began_have_a_page(tmp_path: Path) -> None:
    assert "not started" in text_of(render(RunFolder(tmp_path)))
    (tmp_path / "status.json").write_text('{"state": "failed", "error": "no file matches data/*.parquet"}')
    told = text_of(render(RunFolder(tmp_path)))
    assert (
        "failed" in told and "no file matches data/*.parquet" in told and "No step has been recorded" in told
    )
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_eval(0, 1, 5.0)) + "\n")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "start"}\n{"kind": "incident"}\n')
        stream.write('{"kind": "resume", "micro_batch_size": 4, "micro_batch_not_tried": "one <waits>"}\n')
    page = render(RunFolder(tmp_path))
    assert "micro batches of 4 (not tried for size: one &lt;waits&gt;)" in page
    assert page.count("<svg") == 1 and "Attempt 1 started with 1 worker" in text_of(page)


def test_workers_that_changed_are_drawn_and_listed(run: Path) -> None:
    folder, curves = RunFolder(run), render(RunFolder(run)).count("<svg")
    assert "Workers at step" not in render(folder)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = (record for record in records if record["kind"] == "resume")
    resumed["world_size"] = 5
    records.append({"kind": "resize", "from": 2, "to": 5, "why": "w", "step": 30, "attempt": 2, "time": 1e9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = render(folder)
    assert page.count("<svg") == curves + 1
    assert "Workers at step 30: 2 before, 5 now" in text_of(page)


def test_the_share_of_time_in_steps_that_count_is_shown(run: Path) -> None:
    """30 s of attempt 1 and 30 s of attempt 2, from 1 s before the first step to 1,030 s after it."""
    assert "ETTR 5.8 % effective training time, of 17:10" in text_of(render(RunFolder(run)))


def test_time_between_attempts_is_not_wall_time() -> None:
    times = [(1, 10.0), (1, 30.0), (2, 500.0), (2, 505.0)]
    assert wall_seconds([{"kind": "train", "attempt": a, "time": t} for a, t in times]) == 25.0


def test_counts_in_three_figures() -> None:
    assert [short(n) for n in (840, 12_640, 999_900, 1_966_080, 2.5e9)] == [
        "840",
        "12.6k",
        "1,000k",
        "1.97M",
        "2.5B",
    ]
