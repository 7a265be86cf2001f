"""The report in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from raydist.folder import RunFolder
from raydist.track.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=2000",
)
SERIES = ("loss", "tokens_per_second", "data_wait", "learning_rate", "grad_norm")


def opened(page: Path, scratch: Path) -> tuple[str, list[str]]:
    """The document as the browser has it, and the URLs that it, not the browser itself, asked for."""
    log = scratch / "network.json"
    own = (f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--dump-dom", page.as_uri())
    done = subprocess.run([BROWSER, *FLAGS, *own], capture_output=True, text=True, timeout=120, check=True)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return done.stdout, [e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"]


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_browser_draws_every_curve_and_fetches_nothing(tmp_path: Path) -> None:
    figures = dict.fromkeys((*SERIES, "step_seconds", "data_wait_seconds", "samples", "tokens_seen"), 1.0)
    records = [
        {"kind": "train", "step": step, "attempt": 1, "time": 1e9 + step} | figures for step in range(1, 51)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = write_report(RunFolder(tmp_path), state="finished")
    # without its own prohibition, so that a request would be seen; the second page shows that one is
    bare = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    page.write_text(bare)
    document, asked = opened(page, tmp_path)
    for series in SERIES:
        assert re.search(rf'-series-{series}">\s*<path d="M', document)
    assert asked == []
    page.write_text(bare + '<img src="http://127.0.0.1:9/pixel.png">')
    assert opened(page, tmp_path)[1] == ["http://127.0.0.1:9/pixel.png"]
