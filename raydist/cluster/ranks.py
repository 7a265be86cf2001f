"""End the processes of an attempt that hangs, on whatever host they are."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

import psutil

from raydist.cluster.resources import living_nodes
from raydist.training.beat import Beat


def end_ranks(beats: Sequence[Beat]) -> None:
    """SIGKILL, which a stopped process takes as well. On other hosts by a Ray task there."""
    for host in {beat.host for beat in beats}:
        there = [(beat.pid, beat.started) for beat in beats if beat.host == host]
        if host == socket.gethostname():
            _kill(there)
        else:
            _kill_on(host, there)


def _kill(processes: Sequence[tuple[int, float]]) -> None:
    """pid and start of each; one that has another start by now is another process."""
    for pid, started in processes:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if abs(process.create_time() - started) < 1:
                process.kill()


def _kill_on(host: str, processes: Sequence[tuple[int, float]]) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in living_nodes():
        if node["NodeManagerHostname"] == host:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=there).remote(processes)
            return
