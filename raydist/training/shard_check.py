"""Token shards compared with their manifest while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from raydist.corpus.log import Shard

DOWNLOADS = 4
"""At once, on a node."""


class ShardCheck:
    """Verifies each shard that is asked for, once and in a thread. One for each node and attempt.

    No checkpoint counts that was trained on shards which are not verified: see `so_far`.
    """

    def __init__(self) -> None:
        self._begun: dict[Path, Future[None]] = {}
        self._coming: dict[Path, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raydist-verify")
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="raydist-fetch")

    def want(self, shards: Iterable[Shard]) -> None:
        """Verify these too. Any thread may call it."""
        for shard in shards:
            if shard.path not in self._begun:
                self._begun[shard.path] = self._thread.submit(shard.verify)

    def want_next(self, shards: Iterable[Shard]) -> None:
        """Have these on this node, where token logs are in a bucket; nobody waits for it."""
        for shard in shards:
            if shard.path not in self._begun and shard.path not in self._coming:
                self._coming[shard.path] = self._downloads.submit(shard.fetch)

    def so_far(self) -> Callable[[float], bool]:
        """Says whether all that were asked for until now are verified, or are within so many seconds.

        Raises LogError, which names a damaged one.
        """
        begun = list(self._begun.values())

        def done(within: float) -> bool:
            return not wait(begun, within).not_done and all(each.result() is None for each in begun)

        return done

    def wait(self) -> None:
        """Until all that were asked for are verified. Raises LogError, which names a damaged one."""
        for verified in list(self._begun.values()):
            verified.result()

    def close(self) -> None:
        """Leave undone what nobody waits for."""
        for threads in (self._thread, self._downloads):
            threads.shutdown(wait=False, cancel_futures=True)
