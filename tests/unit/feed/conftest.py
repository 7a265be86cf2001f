from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xxhash
from hypothesis import settings

from raydist.corpus.log import Documents, SliceWriter, TokenLog, open_log
from raydist.corpus.log_folder import LogFolder
from raydist.files import write_json

settings.register_profile("feed", deadline=None)  # a busy machine is not a failure
settings.load_profile("feed")

Lengths = Sequence[Sequence[int]]
Texts = Sequence[Sequence[str]]


@pytest.fixture
def make_log(tmp_path) -> Callable[..., TokenLog]:
    """Writes a real log with a shard for each list of document lengths; its tokens count up from 1.

    texts: of the documents, by shard, for their hashes alone; all different by default.
    """

    def make(
        shards: Lengths, name: str = "log", vocab: int = 2**20, eos: int | None = 0, texts: Texts = ()
    ) -> TokenLog:
        path = tmp_path / "tokens" / name
        records, base = [], 1
        for number, lengths in enumerate(shards):
            writer = SliceWriter(LogFolder(path), number, [f"{name}.txt"])
            of_shard = texts[number] if texts else [f"{name}/{number}/{row}" for row in range(len(lengths))]
            writer.add(_documents(of_shard, np.asarray(lengths, np.int64), base, vocab))
            records += writer.commit()["shards"]
            base += sum(lengths)
        write_json(path / "manifest.json", _manifest(name, shards, records, vocab, eos))
        return open_log(path)

    return make


def _documents(texts: Sequence[str], lengths: np.ndarray, base: int, vocab: int) -> Documents:
    n, total = len(lengths), int(lengths.sum())
    hashes = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return Documents(
        tokens=(np.arange(base, base + total) % vocab).astype(np.uint16 if vocab <= 2**16 else np.uint32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        hashes=np.frombuffer(hashes, np.uint8).reshape(n, 16),
        n_bytes=lengths * 4,
        files=np.zeros(n, np.int32),
        rows=np.arange(n, dtype=np.int64),
    )


def _manifest(name: str, shards: Lengths, records: list, vocab: int, eos: int | None) -> dict:
    return {
        "format": 1,
        "fingerprint": xxhash.xxh3_128_hexdigest(
            f"{name} {[[int(n) for n in shard] for shard in shards]}".encode()
        ),
        "dtype": "uint16" if vocab <= 2**16 else "uint32",
        "vocab_size": vocab,
        "eos_token_id": eos,
        "tokenizer": f"{vocab} {eos}",
        "shards": records,
        "n_quarantined": 0,
        "n_empty": 0,
        **{key: sum(record[key] for record in records) for key in ("n_documents", "n_tokens", "n_bytes")},
    }
