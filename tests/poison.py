"""Token logs with planted noise, for the tests of guards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.train_parts import VOCABULARY, write_manifest, write_slice


class Part(NamedTuple):
    """A shard: its documents, and in which share of them the tokens are noise."""

    n_documents: int
    noise: float = 0.0


def write_poisoned(path: Path, parts: Sequence[Part], seed: int = 0) -> set[tuple[str, int]]:
    """A shard for each part, in a file of its own. Returns (file, row) of the documents that are noise.

    Any other token is mostly a function of the one before it, as in `train_parts.write_log`.
    """
    random = np.random.default_rng(seed)
    shards, planted = [], set()
    for number, (n_documents, share) in enumerate(parts):
        file, lengths = f"part-{number}.txt", random.integers(16, 40, n_documents)
        ids: list[int] = []
        for row, length in enumerate(lengths.tolist()):
            noisy = row < share * n_documents
            planted |= {(file, row)} if noisy else set()
            last = int(random.integers(2, VOCABULARY))
            for _ in range(length):
                guess, drawn = (last * 5 + 3) % (VOCABULARY - 2) + 2, int(random.integers(2, VOCABULARY))
                last = drawn if noisy or random.random() > 0.9 else guess
                ids.append(last)
        shards += write_slice(path, number, file, ids, lengths, f"{seed}/{number}")
    write_manifest(path, shards)
    return planted
