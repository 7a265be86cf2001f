"""What Ray Train writes of its own: with the run; where that is in a bucket, nothing, anywhere.

Ray Train keeps a snapshot of its state and copies of reported checkpoints. raydist resumes from neither, and
a node's folder would not do: each worker looks for a marker of the driver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from ray.train.v2._internal.constants import VALIDATE_STORAGE_MARKER_FILENAME

from raydist.folder import RunFolder


def ray_storage(folder: RunFolder) -> dict[str, Any]:
    """Where Ray Train keeps its own files: with the run, if that is in a folder."""
    if not folder.remote:
        return {"storage_path": str(folder.ray)}
    return {"storage_path": "ray", "storage_filesystem": pafs.PyFileSystem(Unstored())}


class Unstored(pafs.FileSystemHandler):  # type: ignore[misc]
    """A file system that forgets what is written to it, but for Ray Train's marker, which is always there."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unstored)

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "unstored"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> list[Any]:
        return [pafs.FileInfo(path, _type(path)) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        return []

    def _nothing(self, *_: Any, **__: Any) -> None:
        return

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _nothing
    move = copy_file = _nothing

    def open_input_stream(self, path: str) -> Any:
        return pa.BufferReader(b"")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.BufferOutputStream()

    open_append_stream = open_output_stream


def _type(path: str) -> Any:
    if path.endswith(VALIDATE_STORAGE_MARKER_FILENAME):
        return pafs.FileType.File
    return pafs.FileType.NotFound if path.endswith(".json") else pafs.FileType.Directory
