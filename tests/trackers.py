"""Read back what TensorBoard and W&B were given: {name: [(step, value), ...]} in the order written."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]
BLOCK = 32768
"""Bytes of a block of a .wandb file."""


def read_tensorboard(run: Path) -> Points:
    """A session that starts at step s takes back the points at s and after it, as TensorBoard itself does."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points: Points = {}
    files = sorted((run / "tensorboard").iterdir())
    for record in _tfrecords(b"".join(path.read_bytes() for path in files)):
        event = Event.FromString(record)
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            points = {name: [p for p in old if p[0] < event.step] for name, old in points.items()}
        for value in event.summary.value:
            points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


def read_wandb(run: Path, *, rows: int = 0) -> tuple[Points, dict[str, Any], Any]:
    """The points, the config and what else W&B knows of the run: run_id, project, run_group, ...

    W&B's service may still write after it has said that the run is finished: this waits for the record of its
    end. rows: and for so many of history, where drivers before the last have left such a record.
    """
    from wandb.proto.wandb_internal_pb2 import RunRecord

    points: Points = {}
    config: dict[str, Any] = {}
    about, last = RunRecord(), -1
    (path,) = run.glob("wandb/*run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    found = _read_whole(path)
    while not _is_whole(found, rows):
        assert time.monotonic() < deadline, f"{path} has no record of the end"
        time.sleep(0.1)
        found = _read_whole(path)
    for record in found:
        if record.HasField("run"):
            about = record.run
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            assert row["_step"] > last, "W&B drops what goes back"
            last = row["_step"]
            for name in row.keys() - {"step"}:
                points.setdefault(name, []).append((row["step"], row[name]))
    return points, config, about


def _is_whole(records: list[Any], rows: int) -> bool:
    history = sum(record.HasField("history") for record in records)
    return history >= rows and any(record.HasField("exit") for record in records)


def _read_whole(path: Path) -> list[Any]:
    """The records of a .wandb file; none while its end is being written."""
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        return [Record.FromString(raw) for raw in _wandb_records(path.read_bytes())]
    except (AssertionError, struct.error):
        return []


def _tfrecords(content: bytes) -> Iterator[bytes]:
    """length (8 bytes), its checksum (4), data, its checksum (4)."""
    from tensorboardX.record_writer import masked_crc32c

    while content:
        (length,) = struct.unpack_from("<Q", content)
        record, (checksum,) = content[12 : 12 + length], struct.unpack_from("<I", content, 12 + length)
        assert checksum == masked_crc32c(record)
        yield record
        content = content[16 + length :]


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """After 7 bytes a LevelDB log: checksum (4), length (2), type (1: whole; 2, 3, 4: first to last part)."""
    assert content[:4] == b":W&B"
    at, held = 7, b""
    while at < len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind])))
        at, held = at + 7 + length, held + part
        if kind in (1, 4):
            yield held
            held = b""
