"""An attempt without Ray: `torchrun --nproc-per-node 2 -m raydist.training.torchrun SPEC.json`, or python.

SPEC.json is what `AttemptSpec.to_json` gives. SIGTERM asks for a checkpoint and a clean end.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from raydist.parallel.world import backend_of
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train


def main(path: str) -> int:
    spec = AttemptSpec.from_json(Path(path).read_text())
    rank, world_size, local_rank = (int(os.environ.get(name, at)) for name, at in _RANK_VARIABLES)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    if world_size > 1:
        dist.init_process_group(backend_of(device), timeout=timedelta(seconds=300))
    try:
        train(
            spec,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            should_stop=lambda: bool(asked),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


_RANK_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
