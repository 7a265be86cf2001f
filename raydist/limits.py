"""Files that somebody else wrote, read with a limit: a few bytes can ask for all the memory of a machine."""

from __future__ import annotations

from pathlib import Path

JOB_BYTES = 2**20
"""Of a job file, and of a DeepSpeed configuration."""

JSON_BYTES = 2**26
TOKENIZER_BYTES = 2**30
"""Of the JSON files of a model. tokenizer.json and vocab.json hold a whole vocabulary."""


def read_limited(path: Path, most: int = JOB_BYTES) -> str:
    """The UTF-8 text of the file. Raises OSError, and ValueError where it has more than `most` bytes."""
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return content.decode("utf-8")


def oversized(folder: Path) -> str:
    """What is wrong with a JSON file in a model's folder that would be read without end; empty if nothing."""
    for path in sorted(folder.glob("*.json")):
        most = TOKENIZER_BYTES if path.name.startswith(("tokenizer.", "vocab.")) else JSON_BYTES
        if not path.is_file():
            return f"{path} is not a file"
        if (size := path.stat().st_size) > most:
            return f"{path} has {size:,} bytes, and {most:,} is the most that is read"
    return ""
