"""Replicated on CPU, where DDP is another class: the cases of plain DDP, on two ranks and then on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from raydist.parallel.fsdp import Replicated
from raydist.parallel.strategy import Strategy
from raydist.training import loop
from tests.unit.parallel.matrix import run_cases

CASES = [("ddp", "full", "fp32"), ("ddp", "full", "bf16")]


def run_replicated(folder: Path) -> None:
    """In this process the loop takes Replicated, as it does on GPUs."""

    def make(model: nn.Module, job: Any, world: Any, accumulation_steps: int) -> Strategy:
        return Replicated(model, job, world)

    loop.make_strategy = make
    run_cases(folder, CASES)
