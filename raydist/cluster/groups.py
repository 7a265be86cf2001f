"""The placement groups of training workers: freed here where the process that would free them is lost.

Ray frees a group when the job ends that made it, not when the actor dies. Ray Train has an actor that frees
it before. That one asks Ray's dashboard, which an embedded Ray may not have, and gives up where two Rays run
on a machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

import ray
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table

from raydist.folder import RunFolder

STARTING_SECONDS = 60
"""From when Ray makes a group until its workers have written down which one it is, at most."""
LOOK_SECONDS = 5.0


def remove_group(group: str) -> None:
    """group: its id in hexadecimal digits. One that is gone is left alone."""
    with suppress(RayError, ValueError):
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def remove_groups(run: RunFolder) -> None:
    """Those of all its attempts."""
    for group in groups_of(run):
        remove_group(group)


def groups_of(run: RunFolder) -> set[str]:
    """Ids of the groups that attempts of this run have written down."""
    groups = set()
    for file in run.ray.glob("attempt-*/placement-group"):
        with suppress(OSError):
            groups.add(file.read_text().strip())
    return groups


def group_of(run: RunFolder, attempt: int) -> set[str]:
    """The id of the group of that attempt; empty where its workers have not written it down."""
    path = run.placement_group(attempt)
    with suppress(OSError):
        return {path.read_text().strip()} if run.look(path) else set()
    return set()


class Wishes:
    """A placement group for each worker that a run lacks to its most: an autoscaler adds nodes for them.

    What they hold is the run's. They end with this driver at the latest.
    """

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []

    @property
    def ids(self) -> set[str]:
        """In hexadecimal digits."""
        return {group.id.hex() for group in self._groups}

    def make(self, count: int, each: dict[str, float]) -> None:
        """each: what a worker takes. Groups of one, so that some of them may come true."""
        self._groups += [ray.util.placement_group([each]) for _ in range(count)]

    def withdraw(self) -> None:
        for group in self.ids:
            remove_group(group)
        self._groups.clear()


class Unclaimed:
    """Groups of workers that no run has written down: their controller died while they started."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._looked = -LOOK_SECONDS

    def remove(self, claimed: Iterable[str]) -> None:
        """Remove those that have been unclaimed for STARTING_SECONDS since they were first seen here.

        claimed: by any run of this Ray. Called as often as one likes, it looks every LOOK_SECONDS.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked, known = now, set(claimed)
        there = {
            group
            for group, entry in placement_group_table().items()
            if entry["state"] == "CREATED" and any("CPU" in bundle for bundle in entry["bundles"].values())
        }
        self._since = {group: self._since.get(group, now) for group in there - known}
        for group, since in self._since.items():
            if now - since >= STARTING_SECONDS:
                remove_group(group)
