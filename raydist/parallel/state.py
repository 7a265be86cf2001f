"""The state in a checkpoint: trainable weights and the optimizer's state by name, as safetensors.

One format for every strategy and number of ranks: each rank writes a share (share.py, saver.py), and whoever
resumes reads the rows it needs. Nothing is pickled.

    <weight>           the weight
    <slot>.<weight>    each tensor that the optimizer keeps for it, by the optimizer's own name; any shape

Not stored are `step`, which is the run's own, and the options of the optimizer's groups (learning rate,
decay), which are the job's. An optimizer that keeps anything but tensors, `step` and None is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raydist.errors import CheckpointError, TrainingError

STEP = "step"
"""The one name in an optimizer's state that is known here: how many steps it took."""


def read_state(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Collective. Fill `into`, whole tensors or DTensors, in place."""
    reader = HuggingFaceStorageReader(str(folder))
    with _alone_is_fine():
        state_dict_loader.load(dict(into), storage_reader=reader)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """A single rank needs no process group, and no warning of its absence."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def check_fits(
    folder: Path, weights: Mapping[str, torch.Size], state: Mapping[str, torch.Size] | None = None
) -> None:
    """Raises CheckpointError unless the stored weights, and the optimizer's state, are those given.

    Shapes by key. state: None where only the weights will be read.
    """
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found = {key: stored.size for key, stored in metadata.items()}
    slots = {key: slot for key in found if (slot := _slot(key, weights))}
    first, n = _first_difference({key: size for key, size in found.items() if key not in slots}, weights)
    if first is not None:
        raise CheckpointError(
            f"{n} tensors of the checkpoint do not fit the model, the first is {first}",
            where=str(folder),
            why=f"stored {found.get(first)}, the model has {weights.get(first)}",
            fix="the model or its libraries changed since; give the job a new name",
        )
    if state is None:
        return
    # checkpoints of raydist 0.1 have a `step` for each weight
    first, n = _first_difference({key: found[key] for key, slot in slots.items() if slot != STEP}, state)
    if first is not None:
        needed = {_slot(key, weights) for key in state}
        raise CheckpointError(
            f"{n} tensors of the checkpoint do not fit the optimizer, the first is {first}",
            where=str(folder),
            why=f"stored {found.get(first)}, the optimizer has {state.get(first)}; "
            f"it keeps {_listed(needed)}, the checkpoint has {_listed(set(slots.values()) - {STEP})}",
            fix="another optimizer wrote it; go on with that one, or give the job a new name",
        )


def _slot(key: str, weights: Container[str]) -> str:
    """The slot of a stored key; "" for a weight, also for one that the model does not have."""
    slot, _, weight = key.partition(".")
    return slot if weight in weights and key not in weights else ""


def _first_difference(
    found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]
) -> tuple[str | None, int]:
    """The first key that only one has or that differs, and how many there are."""
    keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    return (keys[0] if keys else None), len(keys)


def _listed(slots: Set[str]) -> str:
    return ", ".join(sorted(slots)) or "nothing"


def state_by_name(trainable: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """What a checkpoint stores of an optimizer that steps `trainable` itself: the tensors, not copies.

    Raises TrainingError for an optimizer whose state cannot be stored.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    stored = {name: parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        # without a gradient so far there is no state yet, but whoever resumes looks for it
        state = optimizer.state.get(parameter) or fresh_state(optimizer, groups[parameter], parameter, 0)
        stored |= {f"{slot}.{name}": tensor for slot, tensor in slots_of(name, parameter, state).items()}
    return stored


def slots_of(name: str, weight: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one weight's state that a checkpoint stores, by slot.

    Raises TrainingError for a value that is not a tensor, and for a sharded weight's plain tensor: each rank
    has another one then, and nothing says how they make up the whole.
    """
    slots = {slot: value for slot, value in state.items() if slot != STEP and value is not None}
    for slot, value in slots.items():
        if not isinstance(value, Tensor):
            kind = f"of type {type(value).__name__}, not a tensor"
        elif isinstance(weight, DTensor) and value.ndim and not isinstance(value, DTensor):
            kind = "a plain tensor, though the weight is sharded"
        else:
            continue
        raise TrainingError(
            f"the optimizer's state cannot be saved: its {slot} of {name} is {kind}",
            why="a checkpoint holds the whole state, for any number of workers",
            fix="take another optimizer or, for a sharded weight, strategy: {name: ddp}",
        )
    return slots


def load_state(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: Optimizer, step: int | None
) -> None:
    """Fill weights and, unless step is None, the optimizer's state after `step` steps.

    Raises CheckpointError when the checkpoint does not fit the model or the optimizer.
    """
    shapes = {name: p.shape for name, p in trainable.items()}
    if step is None:
        check_fits(folder, shapes)
        read_state(folder, {name: p.detach() for name, p in trainable.items()})
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = fresh_state(optimizer, group, parameter, step)
    state = state_by_name(trainable, optimizer)
    check_fits(folder, shapes, {key: tensor.shape for key, tensor in state.items() if key not in shapes})
    read_state(folder, state)


def fresh_state(optimizer: Optimizer, group: Mapping[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
    """The optimizer's state of a tensor like this one, after `step` steps with gradients of zero.

    Only the optimizer itself knows what it keeps: another of its class, with the options of `group`, takes
    one step over zeros. That takes twice the tensor's memory for a moment.
    """
    weight = nn.Parameter(torch.zeros_like(tensor, requires_grad=False))
    weight.grad = torch.zeros_like(weight)
    other = type(optimizer)([{**group, "params": [weight]}])  # type: ignore[call-arg]
    other.step()
    state = dict(other.state[weight])
    if isinstance(state.get(STEP), Tensor):
        state[STEP].fill_(step)
    elif STEP in state:
        state[STEP] = step
    return state


def chunks(shapes: Mapping[str, torch.Size], limit: int) -> Iterator[list[str]]:
    """Names in order, in lists of at most `limit` elements together, or of one name."""
    names: list[str] = []
    together = 0
    for name, shape in shapes.items():
        if names and together + shape.numel() > limit:
            yield names
            names, together = [], 0
        names.append(name)
        together += shape.numel()
    if names:
        yield names
