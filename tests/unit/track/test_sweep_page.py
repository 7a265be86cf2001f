import re
from pathlib import Path
from typing import Any

from raydist.folder import RunFolder
from raydist.track.sweep_page import Trial, ranked, write_sweep_page


def trial(name: str, bits: float | None, state: str = "finished", **parameters: Any) -> Trial:
    curve = [(step * 1000, bits + 1 / step) for step in (1, 2, 3)] if bits is not None else []
    keys = {key.replace("_", ".", 1): value for key, value in parameters.items()}
    return Trial(name, keys, state, bits, 3000, curve)


TRIALS = [
    trial("lost", None, "failed", train_lr=1e-4, train_schedule="cosine"),
    trial("early", 0.5, "pruned", train_lr=2e-4, train_schedule="cosine"),
    trial("second", 1.2, train_lr=1e-3, train_schedule="linear"),
    trial("going", 1.4, "running", train_lr=5e-3, train_schedule="cosine"),
    trial("diverged", float("nan"), train_lr=1e-1, train_schedule="linear"),
    trial("first", 1.1, train_lr=3e-3, train_schedule="constant"),
]


def text_of(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>", "", page[page.index("<body>") :], flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def drawings(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.S)


def test_the_best_come_first_and_what_did_not_finish_last() -> None:
    assert [t.name for t in ranked(TRIALS)] == ["first", "second", "diverged", "early", "going", "lost"]


def test_the_page_tells_the_whole_sweep(tmp_path: Path) -> None:
    (tmp_path / "raydist-job.yaml").write_text(
        "name: <demo>\ntracking: {mlflow: 'http://ann:hunter2@host/'}\n"
    )
    page = write_sweep_page(
        RunFolder(tmp_path), TRIALS, state="finished", error="GET http://bob:pw@host <b>"
    ).read_text()
    told = text_of(page)
    for part in (
        "6 3 finished, 1 pruned, 1 running, 1 failed",
        "1.100 first, finished",
        "train.lr 0.003 in the best trial",
        "first 0.003 constant 1.100 3k finished second 0.001 linear 1.200",
        "lost 0.0001 cosine n/a 3k failed",
        "name: &lt;demo&gt;",
    ):
        assert part in told
    assert "hunter2" not in page and "bob:pw" not in page and "<b> " not in page
    assert not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|@import""", page)


def test_a_line_for_each_trial_and_a_drawing_for_each_parameter(tmp_path: Path) -> None:
    curves, by_lr, by_schedule = drawings(write_sweep_page(RunFolder(tmp_path), TRIALS).read_text())
    faint = r'<path d="M [^"]*" [^>]*stroke: var\(--muted\); stroke-opacity: 0.5;[^>]*linecap'
    others = re.findall(faint, curves)
    assert len(others) == 3
    assert 'id="all-trials-series-best"' in curves
    ticks = re.findall(r">([\d.]+)</text>", by_lr)
    assert "0.0002" in ticks and "0.005" in ticks  # logarithmic: 1e-4 to 1e-1 is more than a factor of 20
    places = [by_schedule.index(f">{name}<") for name in ("constant", "cosine", "linear")]
    assert places == sorted(places)


def test_a_sweep_that_hardly_began_has_a_page(tmp_path: Path) -> None:
    assert "No trial has begun yet" in text_of(write_sweep_page(RunFolder(tmp_path), []).read_text())
    failed = Trial("a", {"train.lr": 1}, "failed", None, 0, [], "ConfigError: password=pw <x>")
    page = write_sweep_page(RunFolder(tmp_path), [failed]).read_text()
    assert "ConfigError: password=*** &lt;x&gt;" in text_of(page) and drawings(page) == []
