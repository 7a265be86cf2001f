"""The devices of these tests: a GPU for `make test-gpu`; `make test` runs what is quick on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from raydist.parallel.world import World


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One rank on the device that the test's parameter names."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false here")
    torch.set_num_threads(1)
    yield World(device=torch.device(request.param, 0 if request.param == "cuda" else None))
    if request.param == "cpu" and dist.is_initialized():  # of gloo alone, which is of no use on a GPU
        dist.destroy_process_group()
