"""Layers compiled by torch.compile, each in place: that takes as long for 80 layers as for one."""

from __future__ import annotations

import functools
import sys
from typing import Literal

import torch
from torch import nn

from raydist.errors import ModelError, first_line
from raydist.model.layers import layers_of

Compile = bool | Literal["auto"]
RECOMPILE_LIMIT = 64
"""Shapes and modes (training, evaluation, stages of other block sizes) of a function."""


def allow_recompiling() -> None:
    """From now on for as many shapes as a run has: torch gives up after 8, and runs uncompiled then."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process until now."""
    dynamo = sys.modules.get(
        "torch._dynamo.utils"
    )  # importing it takes long, and without it nothing is compiled
    return 0.0 if dynamo is None else float(dynamo.calculate_time_spent()["total_wall_time"])


def why_not_compiled(asked: Compile, device: torch.device, strategy: str) -> str:
    """Why the layers of this job are not compiled; empty where they are. `auto` compiles on GPUs.

    Raises ModelError where `true` was asked and nothing can be compiled here.
    """
    if asked is False:
        return "train.compile is false"
    if asked == "auto" and device.type != "cuda":
        return f"auto compiles on GPUs, not on {device.type.upper()}"
    if strategy == "zero":
        return "DeepSpeed gathers weights by hooks within the layers, which a compiler cannot see"
    problem = _compiler_problem(device)
    if problem and asked is True:
        raise ModelError(
            "layers cannot be compiled as asked",
            where="train.compile",
            why=problem,
            fix="install a C++ compiler (on a GPU also triton), or take train.compile: auto",
        )
    return problem


@functools.cache
def _compiler_problem(device: torch.device) -> str:
    """What goes wrong with a function of two lines, forward and backward; empty if nothing does."""

    def bend(x: torch.Tensor) -> torch.Tensor:
        return (torch.sin(x) * x).sum()

    x = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(bend, dynamic=False)(x).backward()
    except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, all of which mean the same here
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def compile_layers(model: nn.Module, *, must: bool) -> None:
    """Compile each layer's `forward` in place: names of weights stay, and hooks (FSDP2's) remain outside.

    Layers that are alike share what is compiled. It happens in the first passes, for each shape by itself.
    must: a layer that cannot be compiled raises there; otherwise it runs uncompiled, which torch logs once.
    Raises ModelError for a model whose layers are not known, if they must be.
    """
    layers = layers_of(model)
    if not layers and must:
        raise ModelError(
            f"{type(model).__name__} cannot be compiled layer by layer",
            where="train.compile",
            why="transformers does not say which modules are its layers",
            fix="set train.compile: false",
        )
    allow_recompiling()
    torch._dynamo.config.suppress_errors = not must
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
