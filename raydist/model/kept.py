"""What a forward pass keeps for the backward pass, found by one of fake tensors, which computes nothing.

A formula would have to know each architecture: its norms, its MLP's width, its key-value heads, an adapter's
dropout. The layers of a model are alike, so two small models, of one layer and of two, tell the cost of each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from raydist.job.schema import Job, Lora
from raydist.model.layers import has_experts, text_config
from raydist.model.trust import NO_CODE

FP32 = 4


@dataclass(frozen=True)
class Kept:
    """Bytes for each token of a micro batch.  layer: of one layer.  around: before and after the layers.

    copies: bytes that do not grow with the tokens: weights in the dtype of the products, of all layers.
    between: what one layer hands to the next.
    """

    layer: float
    around: float
    copies: int
    between: float


def kept_for_backward(model: nn.Module, job: Job, layers: int, block_size: int) -> Kept | None:
    """Of the bare model of this configuration, with the job's adapter and precision, on documents of a block.

    model: on meta, as `model_sizes` counted it.  None where its architecture cannot be tried like this.
    """
    config = text_config(model.config)
    if has_experts(config):
        return None  # which experts a token goes through is not known of a fake one
    adapter = job.adapter.model_dump_json() if job.adapter else ""
    # a quantized weight is kept as it is
    dtype = str(getattr(config, "dtype", None) or torch.float32) if job.adapter else str(torch.float32)
    precision = job.train.mixed_precision
    try:
        return _kept(config.to_json_string(use_diff=False), adapter, dtype, precision, layers, block_size)
    except Exception:  # noqa: BLE001 - whatever an architecture does with fake tensors
        return None


@lru_cache(maxsize=16)
def _kept(config: str, adapter: str, dtype: str, precision: str, layers: int, tokens: int) -> Kept:
    one, two = (
        [_saved(config, adapter, dtype, precision, n, rows, tokens) for rows in (1, 2)] for n in (1, 2)
    )
    of_one, of_two = (float(both - single) / tokens for single, both in (one, two))  # for each token
    layer = of_two - of_one
    fixed_one, fixed_two = 2 * one[0] - one[1], 2 * two[0] - two[1]
    copies = fixed_one + (layers - 1) * (fixed_two - fixed_one)
    return Kept(layer, of_one - layer, copies, FP32 * _width(config))


def _saved(config: str, adapter: str, dtype: str, precision: str, layers: int, rows: int, tokens: int) -> int:
    """Bytes of the tensors that a model of so many layers keeps, but for its weights."""
    small = _of_layers(config, layers)
    body = _body(small, adapter)
    own, kept = set[int](), dict[int, Any]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    with FakeTensorMode():
        state = {name: _fake(tensor, dtype) for name, tensor in body.named_parameters()}
        own |= {tensor.untyped_storage()._cdata for tensor in state.values()}
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in body.named_buffers()}
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        places = torch.arange(tokens).unsqueeze(0).expand(rows, tokens)
        given = {"input_ids": ids, "position_ids": places, "use_cache": False}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", compute, enabled=precision != "fp32"),
        ):
            functional_call(body, {**state, **buffers}, (), given)
    return sum(storage.nbytes() for storage in kept.values())


def _fake(parameter: Tensor, dtype: str) -> Tensor:
    """Trained weights are fp32, frozen ones in the base's own dtype."""
    frozen = getattr(torch, dtype.removeprefix("torch."))
    of = torch.float32 if parameter.requires_grad else frozen
    return torch.empty(parameter.shape, dtype=of, requires_grad=parameter.requires_grad)


def _body(config: Any, adapter: str) -> nn.Module:
    """The layers without the head, whose logits are not kept."""
    from transformers import AutoModelForCausalLM

    from raydist.model.adapter import add_lora

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **NO_CODE)
        if adapter:
            model = add_lora(model, Lora.model_validate_json(adapter)).get_base_model()  # type: ignore[operator]
    body: nn.Module = model.base_model
    return body.train()


def _of_layers(config: str, layers: int) -> Any:
    """The configuration with so many layers, each of its first kind."""
    from transformers import AutoConfig

    given = json.loads(config)
    kind = given.pop("model_type")
    given["num_hidden_layers"] = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(given.get(name), list):
            given[name] = (given[name][:1] * layers) if given[name] else given[name]
    return AutoConfig.for_model(kind, **given)


def _width(config: str) -> int:
    return int(_of_layers(config, 1).hidden_size)
