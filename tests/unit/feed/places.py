"""Where the samples of a run come from, whatever stage they belong to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from raydist.feed.feed import Feed
from raydist.feed.stage import Place


def places_of(feed: Feed, samples: Iterable[int]) -> list[Place]:
    return [feed.stages[feed.stage_number(g)].places(np.array([g]))[0] for g in samples]
