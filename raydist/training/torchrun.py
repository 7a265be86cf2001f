"""One rank as torchrun starts it: the process group and the signals around `train`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from raydist.parallel.world import World, backend_of
from raydist.training.attempt_spec import AttemptSpec, TrainResult
from raydist.training.hooks import Hook, StopOnRequest
from raydist.training.loop import train

COLLECTIVE_TIMEOUT_SECONDS = 300


@contextmanager
def torchrun_world() -> Iterator[World]:
    """This rank by RANK, WORLD_SIZE and LOCAL_RANK, with its process group; alone where they are not set."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world_size, local_rank = (int(os.environ.get(name, value)) for name, value in defaults.items())
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(backend_of(device), timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS))
    try:
        yield World(rank, world_size, local_rank, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or Ctrl-C asked for a checkpoint and a clean end."""
    asked: list[int] = []
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in signals}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_rank(spec: AttemptSpec, world: World, hooks: Sequence[Hook] = ()) -> TrainResult:
    """`train`, with a checkpoint and a clean end on SIGTERM or Ctrl-C."""
    with stop_on_signals() as asked:
        return train(spec, world, hooks=[StopOnRequest(asked), *hooks])
