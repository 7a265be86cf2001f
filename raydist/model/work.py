"""How much a model computes: the floating-point operations of a training step, counted by what it needs.

A product with a weight costs 2 operations a weight and input in the forward pass, 2 for the gradient of what
went in, and 2 for the gradient of the weight if that is trained: 6 for a trained weight, 4 for a frozen one.
A lookup in an embedding is no product; the output head is one, also where it shares the embedding's weight.
Of experts, those that an input goes through count. Attention costs the same again by pairs: each input and
the inputs before it in its document, within the layer's window.

Left out: all that is done once more (gradient checkpointing, attention's scores in its backward pass, weights
dequantized again), padding, and what is not a product (norms, rotations, softmax, the loss, the optimizer).
Also the state of recurrent and linear attention layers. A frozen weight counts 4 also below the lowest
adapter, where its input needs no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raydist.model.experts import QuantizedExperts
from raydist.model.layers import bare_of, heads_of, layer_configs, not_of_text, text_config
from raydist.model.quantized import Quantized

_NO_ATTENTION = ("linear_attention", "conv", "moe")


@dataclass(frozen=True)
class Work:
    """Operations of forward and backward passes.

    per_input: of products with weights.  per_pair: of attention, for an input and one that it sees, of all
    layers with the same window, by how many inputs one sees at most, itself included, or None for all.
    """

    per_input: int
    per_pair: Mapping[int | None, int]

    def flops(self, n_inputs: int, document_lengths: NDArray[np.integer]) -> float:
        """For so many inputs in documents of these lengths, int [documents], on which it does not wait."""
        pairs = sum(cost * visible_pairs(document_lengths, window) for window, cost in self.per_pair.items())
        return float(self.per_input * n_inputs + pairs)


def visible_pairs(lengths: NDArray[np.integer], window: int | None = None) -> int:
    """Pairs of an input and one that it sees, in documents of these lengths: n (n + 1) / 2 of n inputs."""
    lengths = lengths.astype(np.int64)
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def work_of(model: nn.Module) -> Work:
    """Counted on the whole model, with its adapter if it has one, before weights are sharded."""
    config = text_config(model.config)
    per_pair: Counter[int | None] = Counter()
    for layer, (attends, window) in zip(layer_configs(config), _windows(config), strict=True):
        if attends:
            heads, _, key, value = heads_of(layer)
            per_pair[window] += 3 * 2 * heads * (key + value)
    bare = bare_of(model)
    others = {m for path in not_of_text(bare) for m in bare.get_submodule(path).modules()}
    return Work(sum(_per_input(m, config) for m in model.modules() if m not in others), +per_pair)


def _per_input(module: nn.Module, config: Any) -> int:
    """Of the products with the module's own weights; not those of the modules in it."""
    if isinstance(module, nn.Embedding):
        return 0
    total = 0
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim < 2 or name.endswith("bias"):
            continue
        size = weight.numel()
        if isinstance(module, nn.Linear | Quantized):  # a quantized one packs its weights
            size = module.in_features * module.out_features
        if isinstance(module, QuantizedExperts):
            size = size // module.shape[0] * config.num_experts_per_tok
        elif weight.ndim == 3 and getattr(module, "num_experts", None) == len(weight):
            size = size // len(weight) * config.num_experts_per_tok
        total += (6 if weight.requires_grad else 4) * size
    return total


def _windows(config: Any) -> list[tuple[bool, int | None]]:
    """Whether a layer has attention, and its window. A chunk is taken for one: at most twice too much."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        used = getattr(config, "use_sliding_window", True)
        return [(True, window if used else None)] * config.num_hidden_layers
    return [
        (kind not in _NO_ATTENTION, window if "sliding" in kind or "chunked" in kind else None)
        for kind in kinds
    ]
