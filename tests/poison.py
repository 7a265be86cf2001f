"""Token logs with planted noise, for the tests of guards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from raydist.corpus.log import Documents, SliceWriter
from raydist.corpus.log_folder import LogFolder
from raydist.files import write_json
from tests.train_parts import VOCABULARY


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
        hashes = b"".join(
            xxhash.xxh3_128_digest(f"{seed}/{number}/{row}".encode()) for row in range(n_documents)
        )
        documents = Documents(
            tokens=np.array(ids, np.uint16),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
            n_bytes=lengths.astype(np.int64) * 4,
            files=np.zeros(n_documents, np.int32),
            rows=np.arange(n_documents, dtype=np.int64),
        )
        writer = SliceWriter(LogFolder(path), number, [file])
        writer.add(documents)
        shards += writer.commit()["shards"]
    totals = {key: sum(shard[key] for shard in shards) for key in ("n_documents", "n_tokens", "n_bytes")}
    manifest = {
        "format": 1,
        "fingerprint": path.name,
        "dtype": "uint16",
        "vocab_size": VOCABULARY,
        "eos_token_id": 0,
        "tokenizer": "words",
        "shards": shards,
        "n_quarantined": 0,
        "n_empty": 0,
        **totals,
    }
    write_json(path / "manifest.json", manifest)
    return planted
