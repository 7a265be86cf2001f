"""The processes of the Ray that this process started."""

from __future__ import annotations

from typing import Any

NEEDED = {"raylet": "raylet", "gcs_server": "GCS"}
"""Without these nothing runs on it."""


def is_embedded() -> bool:
    """Whether the Ray that this process is connected to is its own."""
    from ray._private import worker

    node: Any = worker._global_node
    return node is not None and bool(node.head)


def ended_part() -> str:
    """Which of those that are needed has ended; empty while all live, or where Ray is another process's."""
    from ray._private import worker

    node: Any = worker._global_node
    for kind, process in node.dead_processes() if node is not None else ():
        if kind in NEEDED:
            return f"Ray's {NEEDED[kind]} (process {process.pid}) has ended"
    return ""
