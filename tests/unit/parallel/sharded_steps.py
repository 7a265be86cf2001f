"""One rank of two: steps of the sharded Muon, compared with torch's own of the whole matrix."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Muon, Optimizer

from raydist.files import write_json
from raydist.parallel.optimizer import GatheredMuon

SHAPES = [(96, 64), (64, 96), (65, 40), (3, 200), (1, 32)]  # also with uneven shards, and with an empty one


def compare(result: Path) -> None:
    """Writes {shape: the largest difference of a weight after three steps}."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for shape in SHAPES:
        draw = torch.Generator().manual_seed(0)
        start, *gradients = (torch.randn(shape, generator=draw) for _ in range(4))
        whole, sharded = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        _step(Muon([{"params": [whole], **options}]), whole, gradients)
        shards = [distribute_tensor(gradient, mesh, [Shard(0)]) for gradient in gradients]
        _step(GatheredMuon([{"params": [sharded], **options}]), sharded, shards)
        assert isinstance(sharded, DTensor)
        found[str(shape)] = (sharded.full_tensor() - whole).abs().max().item()
    if dist.get_rank() == 0:
        write_json(result, found)
    dist.destroy_process_group()


def _step(optimizer: Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
