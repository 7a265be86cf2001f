"""What the commands print about a plan and about token logs."""

from pathlib import Path
from typing import Any

import pytest

from raydist.cli import show
from raydist.corpus.log_folder import LogFolder


@pytest.mark.parametrize("has_manifest", [True, False])
def test_prepare_says_what_a_source_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_manifest: bool
) -> None:
    left_out = {"excluded": {"count": 1234, "examples": ["a", "b", "c"]}}
    if has_manifest:
        LogFolder(tmp_path).write_manifest({"format": 1, "left_out": left_out})
    counts: dict[str, Any] = dict.fromkeys(
        ["n_documents", "n_tokens", "mean_tokens", "n_shards", "n_quarantined", "n_empty"], 0
    )
    source = {**counts, "path": str(tmp_path)}
    show.prepared({"sources": {"s": source}, "eval_sources": {}, "unique_share": 1.0, "packing": []})
    assert ("  not used, excluded: 1,234 (a, b, c, ...)\n" in capsys.readouterr().out) == has_manifest
