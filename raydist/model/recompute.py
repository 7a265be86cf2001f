"""Gradient checkpointing: layers keep little of their forward pass and repeat it in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from raydist.errors import ModelError
from raydist.model.layers import layers_of

SELECTIVE: Literal["selective"] = "selective"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "quantized_linear"}
CHANGED_IN_PLACE = {"mm", "bmm", "_grouped_mm"}
"""transformers adds a bias of experts, as gpt-oss has, in place: results that are kept would be wrong."""
ATTENTION = ("attention", "attn")
"""Parts of the names of attention operators: PyTorch's SDPA and flex attention, flash-attn's, our own."""


def checkpoint_layers(model: nn.Module, which: bool | int | Literal["selective"]) -> None:
    """Let layers recompute their activations. which: every layer (True), every n-th, or SELECTIVE.

    SELECTIVE: every layer, but matrix products and attention keep their results and are not repeated.

    A layer's `forward` is replaced, so names of weights stay, a compiled layer compiles its recomputation
    too, and FSDP2 gathers the layer outside of it. The generators' state is restored for the second pass:
    dropout drops the same again. Raises ModelError for a model whose layers are not known.
    """
    if which is False:
        return
    layers = _outermost(
        [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] or layers_of(model)
    )
    if not layers:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its activations",
            where="train.gradient_checkpointing",
            why="transformers does not say which modules are its layers",
            fix="set train.gradient_checkpointing: false",
        )
    every = which if isinstance(which, int) and which is not True else 1
    options: dict[str, Any] = {"use_reentrant": False}
    if which == SELECTIVE:
        kept = PRODUCTS - CHANGED_IN_PLACE if _has_biased_experts(model) else PRODUCTS
        policy = partial(_keep_products, frozenset(kept))
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for layer in layers[::every]:
        layer.forward = _recomputed(layer, layer.forward, options)


def _outermost(layers: list[nn.Module]) -> list[nn.Module]:
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def _recomputed(layer: nn.Module, forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, **options)

    return run


def _has_biased_experts(model: nn.Module) -> bool:
    return any(getattr(m, "num_experts", None) and getattr(m, "has_bias", False) for m in model.modules())


def _keep_products(
    kept: frozenset[str], _: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """operator: an OpOverload, whose name is aten::mm, aten::mm.out or the like; or flex attention's."""
    name = operator.name().rpartition("::")[2].partition(".")[0]
    keep = name in kept or any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
