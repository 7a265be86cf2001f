"""From a sample back to its documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from raydist.corpus.log import TokenLog
from raydist.feed.feed import Feed
from raydist.feed.pack_index import FeedSource
from raydist.feed.trace import pieces
from raydist.job.plan import Stretch
from raydist.job.schema import Packing


@pytest.mark.parametrize("strategy", ["best_fit", "concat"])
@pytest.mark.parametrize("stretches", [(), (Stretch(8, 4), Stretch(16, 100))], ids=["one stage", "two"])
def test_each_input_is_found_in_its_document(
    make_log: Callable[..., TokenLog], strategy: str, stretches: tuple[Stretch, ...]
) -> None:
    logs = [make_log([[3, 20, 1], [9, 9, 4, 2]], "a"), make_log([[30, 5], [7]], "b")]
    packing = Packing(block_size=8, strategy=strategy, window_shards=2)  # type: ignore[arg-type]
    sources = [FeedSource(name, log, None) for name, log in zip("ab", logs, strict=True)]
    feed = Feed(sources, packing, 3, 0.0, stretches=stretches)
    seen = 0
    for g in range(16):
        block, found = feed.block(g)["input_ids"], pieces(feed, g)
        assert [piece.first for piece in found] == np.cumsum([0, *(p.length for p in found)])[:-1].tolist()
        for piece in found:
            log = logs["ab".index(piece.source)]
            (shard,) = [shard for shard in log.shards if shard.name == piece.shard]
            start, stop = shard.offsets()[piece.document : piece.document + 2]
            document = [*shard.tokens()[start:stop].tolist(), 0]
            expected = document[piece.skipped : piece.skipped + piece.length]
            assert block[piece.first : piece.first + piece.length].tolist() == expected
            assert piece.rest == len(document) - piece.skipped - piece.length
            assert (piece.file, piece.row) == (f"{log.path.name}.txt", piece.document)
            seen += piece.length
    assert seen > 90
