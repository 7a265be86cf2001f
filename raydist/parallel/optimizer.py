"""The optimizer, chosen here alone, and what every strategy does with gradients before its step.

A further optimizer is a name in `job/schema.py:Optimizer` and a branch in `_class_of` and `_bytes`, and in
`_kinds` if it steps only some of the weights. Its class must accept its own parameter groups as its only
argument, as those of torch and bitsandbytes do, and keep its state as `parallel/state.py` says. A strategy
that it does not work under is a line in `job/rules.py:NOT_SHARDED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from raydist.errors import ModelError
from raydist.job.schema import Train
from raydist.model.layers import layers_of

NORM_CHUNK = 512
LR_SCALE = "lr_scale"
"""Of a parameter group: its learning rate by that of the others."""
FP32 = torch.float32.itemsize
LEAST_8BIT, BLOCK_8BIT, MAP_8BIT = 4096, 256, 256
"""bitsandbytes: elements from which state is quantized, values to a scale, entries of a codebook."""


def make_optimizer(model: nn.Module, train: Train) -> Optimizer:
    """The job's optimizer over the trainable weights. The learning rate is set at each step.

    Matrices decay; vectors (norms, biases) do not. Raises ModelError where muon finds no matrix.
    """
    groups = _groups(model, train)
    if {group["kind"] for group in groups} == {train.optimizer.name}:
        plain = [{key: value for key, value in group.items() if key != "kind"} for group in groups]
        return _class_of(train.optimizer.name)(plain)
    return Mixed(groups)


def state_bytes(model: nn.Module, train: Train) -> int:
    """Bytes that the job's optimizer keeps for the trainable weights, in memory and in a checkpoint.

    The model may be on meta. Raises ModelError where muon finds no matrix.
    """
    groups = _groups(model, train)
    return sum(_bytes(group["kind"], weight.shape) for group in groups for weight in group["params"])


class Mixed(Optimizer):
    """Steps each group by the optimizer that its `kind` names; the groups and the state of all are here."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._steppers = []
        for kind in dict.fromkeys(group["kind"] for group in self.param_groups):
            stepper = _class_of(kind)([group for group in self.param_groups if group["kind"] == kind])
            stepper.state = self.state
            self._steppers.append(stepper)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for stepper in self._steppers:
            stepper.step()


class GatheredMuon(Muon):
    """torch's Muon, which also steps weights that are sharded over the ranks, with one gather for a matrix.

    torch's own needs 11 to 16 collectives for one, and fails for one with fewer rows than there are ranks.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not any(isinstance(w, DTensor) for group in self.param_groups for w in group["params"]):
            super().step()  # type: ignore[no-untyped-call]
            return
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_sharded(weight, weight.grad, group)

    def _step_sharded(self, weight: DTensor, gradient: DTensor, group: dict[str, Any]) -> None:
        """The momentum is kept in shards; each rank makes the step of the whole matrix and takes its rows."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction: Any = gradient.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov's
        whole: Tensor = direction.full_tensor()
        step = nn.Parameter(torch.zeros_like(whole))
        step.grad = whole
        only = {**group, "params": [step], "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        Muon([only]).step()
        rows = distribute_tensor(step.detach(), weight.device_mesh, weight.placements, src_data_rank=None)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(rows)


def _groups(model: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Parameter groups, each with its `kind`, the optimizer that steps it: at most four for each kind."""
    kinds = _kinds(model, train.optimizer.name)
    embeddings = set() if train.embedding_learning_rate is None else _embeddings(model)
    groups = []
    for kind in dict.fromkeys(kinds.values()):
        # muon's steps are scaled to about the length of AdamW's: one lr and one weight_decay serve both
        options = {"adjust_lr_fn": "match_rms_adamw"} if kind == "muon" else train.optimizer.options
        for decay, decays in ((train.weight_decay, True), (0.0, False)):
            params = [w for w, of in kinds.items() if of == kind and (w.ndim >= 2) == decays]
            group = {"params": params, "weight_decay": decay, "lr": 0.0, **options, "kind": kind}
            groups += [part for part in _by_rate(group, embeddings, train) if part["params"]]
    return groups


def _by_rate(group: dict[str, Any], embeddings: set[nn.Parameter], train: Train) -> list[dict[str, Any]]:
    """The group in two, where embeddings have a learning rate of their own."""
    if train.embedding_learning_rate is None:
        return [group]
    rest = [weight for weight in group["params"] if weight not in embeddings]
    own = [weight for weight in group["params"] if weight in embeddings]
    scale = train.embedding_learning_rate / train.lr
    return [{**group, "params": rest}, {**group, "params": own, LR_SCALE: scale}]


def _embeddings(model: Any) -> set[nn.Parameter]:
    """The trained weights of the embedding and the head, without an adapter's.

    Raises ModelError where there are none: the job has a learning rate for them.
    """
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {w for m in modules if m is not None for w in m.parameters(recurse=False) if w.requires_grad}
    if not weights:
        raise ModelError(
            "neither the embedding nor the head is trained",
            where="train.embedding_learning_rate",
            why="adapter.modules_to_save names neither of them",
            fix="name them there, most often [embed_tokens, lm_head], or leave this key out",
        )
    return weights


def _kinds(model: nn.Module, name: str) -> dict[nn.Parameter, str]:
    """The optimizer of each trainable weight: the job's, or AdamW where that does not fit the weight.

    bitsandbytes advises 32 bits for embeddings, whose gradients are uneven, as Hugging Face's Trainer has it.
    """
    others: set[nn.Parameter] = set()
    if name == "muon":
        matrices = {w for layer in layers_of(model) for w in layer.parameters() if w.ndim == 2}
        others = {*model.parameters()} - matrices
    elif name == "adamw_8bit":
        others = {w for m in model.modules() if isinstance(m, nn.Embedding) for w in m.parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if name == "muon" and others.issuperset(trained):
        raise ModelError(
            "muon finds no matrix to step",
            where="train.optimizer",
            why="it steps the trainable matrices of the layers, and the model's class names no such layers",
            fix="take train.optimizer: adamw",
        )
    return {weight: "adamw" if weight in others else name for weight in trained}


def _class_of(kind: str) -> Callable[[list[dict[str, Any]]], Optimizer]:
    if kind == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit
    if kind == "muon":
        return GatheredMuon
    return Adafactor if kind == "adafactor" else partial(AdamW, fused=True)


def _bytes(kind: str, shape: torch.Size) -> int:
    """Of the state of one weight."""
    n = shape.numel()
    if kind == "adafactor" and len(shape) >= 2:  # a value for each row and each column
        return FP32 * (n // shape[-1] + n // shape[-2])
    if kind == "adamw_8bit" and n >= LEAST_8BIT:  # two of: a byte each, the scales, the codebook
        return 2 * (n + FP32 * (math.ceil(n / BLOCK_8BIT) + MAP_8BIT))
    return FP32 * n * (1 if kind in ("muon", "adafactor") else 2)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """lr: by the schedule; groups with a learning rate of their own follow it in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Scalar fp64, on their device: the 2-norm of all together.

    On CPU chunks of 512 in fp32, their squares in fp64: within 1e-7, and as quick as fp32 alone, which
    errs by 1e-3 over 28M elements there. vector_norm in fp64 took 17 ms for 6M elements, this 0.2 ms.
    A GPU adds in a tree, which is as exact, and gets few kernels for many tensors.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients)).double().square_().sum().sqrt()
    squares = [part.double().square_().sum() for gradient in gradients for part in _chunk_norms(gradient)]
    return torch.stack(squares).sum().sqrt()


def _chunk_norms(gradient: Tensor) -> Iterator[Tensor]:
    flat = gradient.reshape(-1)
    whole = flat.numel() // NORM_CHUNK * NORM_CHUNK
    yield torch.linalg.vector_norm(flat[:whole].view(-1, NORM_CHUNK), dim=1)
    yield torch.linalg.vector_norm(flat[whole:])


def clip_(gradients: list[Tensor], norm: Tensor, limit: float | None) -> None:
    """Scale in place so that the norm, which is `norm` now, is at most `limit`. No GPU is waited for."""
    if limit is None:
        return
    if norm.device.type != "cpu":
        torch._foreach_mul_(gradients, (limit / norm).clamp_(max=1.0).float())
    elif (now := norm.item()) > limit:
        torch._foreach_mul_(gradients, limit / now)
