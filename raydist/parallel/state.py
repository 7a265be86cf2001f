"""The state in a checkpoint: trainable weights and AdamW's moments by name, as safetensors.

One format for every strategy and number of ranks: each rank writes a share, and whoever resumes
reads the rows it needs. The optimizer's step count is the run's own. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from raydist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_state(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Collective. state: this rank's tensors; DTensors, or whole ones that this or every rank has."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_is_fine():
        state_dict_saver.save(dict(state), storage_writer=writer)


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


def check_fits(folder: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Raises CheckpointError unless the stored weights are those named, in those shapes."""
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    prefixes = (*(f"{moment}." for moment in MOMENTS), "step.")  # step.: of older checkpoints
    found = {name: stored.size for name, stored in metadata.items() if not name.startswith(prefixes)}
    differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"{len(differing)} tensors of the checkpoint do not fit the model, the first is {first}",
            where=str(folder),
            why=f"stored {found.get(first)}, the model has {shapes.get(first)}",
            fix="the model or its libraries changed since; give the job a new name",
        )


def adamw_state(trainable: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """What a plain AdamW over `trainable` needs to go on: weights and moments, by name."""
    weights = {name: p.detach() for name, p in trainable.items()}
    moments = {f"{m}.{name}": optimizer.state[p][m] for name, p in trainable.items() for m in MOMENTS}
    return {**weights, **moments}


def load_adamw(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: Optimizer, step: int | None
) -> None:
    """Fill weights and, unless step is None, the optimizer's state after `step` steps."""
    check_fits(folder, {name: p.shape for name, p in trainable.items()})
    if step is None:
        read_state(folder, {name: p.detach() for name, p in trainable.items()})
        return
    for parameter in trainable.values():
        optimizer.state[parameter] = fresh_moments(parameter.detach(), step)
    read_state(folder, adamw_state(trainable, optimizer))


def fresh_moments(weight: Tensor, step: int) -> dict[str, Tensor]:
    """AdamW's state of one tensor, the moments still zero."""
    moments = {moment: torch.zeros_like(weight) for moment in MOMENTS}
    return {**moments, "step": torch.tensor(float(step), device=weight.device)}


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
