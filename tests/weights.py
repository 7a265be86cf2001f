"""A hash of the weights in a model's folder, by which two trainings are known to have ended the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open


def weight_hash(folder: Path) -> str:
    """xxh3_128 over names and bytes of all tensors in the folder's safetensors files, in order of names."""
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            where.update(dict.fromkeys(stored.keys(), path))
    digest = xxhash.xxh3_128()
    for name in sorted(where):
        with safe_open(where[name], "pt") as stored:
            tensor = stored.get_tensor(name)
        digest.update(os.fsencode(name))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
