"""A line of records that was altered is never believed; one of an older version is read as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raydist.errors import RunError
from raydist.sealed import append_sealed, opened, read_sealed_lines

RECORD = {"kind": "train", "step": 3, "loss": 1.25, "why": 'a "quoted" text, ü'}


def test_a_line_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_sealed(path, RECORD)
    append_sealed(path, {"mean": np.float32(0.5)}, flush=True)
    assert read_sealed_lines(path) == [RECORD, {"mean": 0.5}]


def test_no_flipped_bit_changes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_sealed(path, RECORD)
    line = path.read_bytes().rstrip()
    for position in range(8 * len(line)):
        altered = bytearray(line)
        altered[position // 8] ^= 1 << position % 8
        try:
            record = opened(bytes(altered))
        except ValueError:
            continue
        assert {name: record.get(name) for name in RECORD} == RECORD  # the checksum's own key was hit
    path.write_bytes(line.replace(b"1.25", b"1.35") + b"\n")
    with pytest.raises(RunError, match=r"records\.jsonl is damaged") as refused:
        read_sealed_lines(path)
    assert refused.value.where == f"{path}, line 1" and "checksum" in refused.value.why


def test_a_line_of_an_older_version_is_read_as_it_is() -> None:
    assert opened(b'{"kind":"train","step":3}') == {"kind": "train", "step": 3}
    with pytest.raises(ValueError, match="no JSON object"):
        opened(b"[1]")
