"""From a sample back to its text: which document of which file each input comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydist.feed.feed import Feed


@dataclass(frozen=True)
class Piece:
    """A run of inputs that come from one document.

    source: its name.  file, row: of the document, as its token log has them.  document: its number in the
    shard.  shard: its name.  first, length: the run in the block's inputs.  skipped: inputs of the document
    in front of the run.  rest: those behind it.
    """

    source: str
    file: str
    row: int
    shard: str
    document: int
    first: int
    length: int
    skipped: int
    rest: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def pieces(feed: Feed, g: int) -> list[Piece]:
    """Of the run's sample g, from left to right; what they leave of the block is padding."""
    stage = feed.stages[feed.stage_number(g)]
    (place,) = stage.places(np.array([g]))
    index, _ = stage.open(place.stream, place.stream_shard)
    source = stage.sources[place.source]
    shard = source.log.shards[place.shard]
    columns = shard.batch().select(["file", "row"])
    offsets = shard.offsets()
    found, at = [], 0
    for piece in range(int(index.first[place.block]), int(index.first[place.block + 1])):
        document, length = int(index.document[piece]), int(index.length[piece])
        found.append(
            Piece(
                source=source.name,
                file=columns.column("file")[document].as_py(),
                row=columns.column("row")[document].as_py(),
                shard=shard.name,
                document=document,
                first=at,
                length=length,
                skipped=max(0, int(index.offset[piece] - offsets[document])),
                rest=int(index.rest[piece]),
            )
        )
        at += length
    return found
