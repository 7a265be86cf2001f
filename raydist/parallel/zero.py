"""DeepSpeed ZeRO: stage 1 shards the optimizer's state, 2 the gradients as well, 3 the weights too.

DeepSpeed's engine clips and steps. Its checkpoints are not used: they are pickles, and bound to one
number of ranks. Ours are made with its functions to read and write sharded state.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.model.loss import loss_of
from raydist.parallel.loss_scale import loss_scale_for, written_scale
from raydist.parallel.optimizer import make_optimizer, set_learning_rate
from raydist.parallel.saver import Saver
from raydist.parallel.share import Piece, shared_out
from raydist.parallel.state import check_fits, chunks, fresh_state, read_state, slots_of
from raydist.parallel.strategy import SaveHandle, Take
from raydist.parallel.weights import materialize
from raydist.parallel.world import World

LOAD_ELEMENTS = 2**28
"""Read from a checkpoint at once: 1 GiB of fp32."""


class Zero:
    """Weights, gradients and the optimizer's state are fp32; DeepSpeed keeps them in flat buffers."""

    def __init__(self, model: nn.Module, job: Job, world: World, accumulation_steps: int) -> None:
        self.module, self.world, self.sharded = model, world, job.strategy.stage == 3
        world.ensure_group()
        deepspeed = import_deepspeed(world.device)
        if self.sharded:
            materialize(model)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trainable.items()}
        optimizer = make_optimizer(model, job.train)
        self.slots = flat_slots(optimizer, world.device)
        config = {
            **job.deepspeed(),
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports it
            "gradient_accumulation_steps": accumulation_steps,
        }
        if self.sharded:
            self._partition(deepspeed, config)
        self.engine: Any = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        self.model: nn.Module = self.engine
        self.loss_scale = loss_scale_for(job.train.mixed_precision)
        self._saver = Saver(world)
        if self.loss_scale is not None:
            # DeepSpeed's own scaler for autocast clips by the scaled norm, and is updated once for each group
            self.engine.optimizer.torch_autocast_gradscaler = None
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)
        self._take: Take | None = None
        self._refused: float | None = None
        self._ask_before_steps()

    def _ask_before_steps(self) -> None:
        """DeepSpeed skips a step whose norm is infinite: what its optimizer computes of the gradients is
        replaced by infinity where `take` says no.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        optimizer = self.engine.optimizer
        if self.sharded:
            norms_of_groups = optimizer._get_norm_groups

            def norms_or_infinity() -> list[Any]:
                norms: list[Any] = norms_of_groups()
                return norms if self._takes(lambda: combine_grad_norm_groups(norms)) else [math.inf]

            optimizer._get_norm_groups = norms_or_infinity
            return
        norm_of_all = optimizer.scaled_global_norm

        def norm_or_infinity(*args: Any, **kwargs: Any) -> Any:
            norm = norm_of_all(*args, **kwargs)
            return norm if self._takes(lambda: norm) else math.inf

        optimizer.scaled_global_norm = norm_or_infinity

    def _takes(self, scaled_norm: Callable[[], Any]) -> bool:
        """In fp16 an infinite norm is the loss scale's alone."""
        if self._take is None:
            return True
        norm = float(scaled_norm()) / (1.0 if self.loss_scale is None else self.loss_scale.scale)
        if (self.loss_scale is not None and not math.isfinite(norm)) or self._take(norm):
            return True
        self._refused = norm
        return False

    def _partition(self, deepspeed: Any, config: dict[str, Any]) -> None:
        """One parameter at a time; `initialize` alone would first move the whole model to the device."""
        for buffer in self.module.buffers():
            dist.broadcast(buffer, src=0)
            buffer.data = buffer.to(self.world.device)
        deepspeed.zero.Init(module=self.module, config_dict_or_path=config)

    def forward_backward(self, batch: dict[str, Tensor], n_labels: int, *, last: bool) -> Tensor:
        """DeepSpeed averages over ranks and micro batches: undone by the factor and the flag."""
        self.engine.set_gradient_accumulation_boundary(last)
        loss = loss_of(self.engine, batch) / n_labels
        self.engine.backward(loss * self.world.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro batch
        return loss.detach()

    def update(self, lr: float, max_grad_norm: float | None, take: Take | None = None) -> Tensor:
        """DeepSpeed unscales and clips within its step, reads the norm, and skips the step when it is bad."""
        set_learning_rate(self.engine.optimizer, lr)
        self._saver.settle()
        self._take, self._refused = take, None
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if self._refused is None else self._refused
        if self.loss_scale is not None:
            self.loss_scale.accepts(norm)
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)
        return torch.tensor(norm, dtype=torch.float64)

    def save(self, folder: Path, *, behind: bool) -> SaveHandle:
        """Gathered a tensor at a time; each rank keeps, or writes at once, its share of them."""
        self._fill_state(0)  # if every step so far was skipped
        self._link_slots()
        more = written_scale(self.loss_scale, self.world)
        return self._saver.save(folder, self._pieces(), self._gathered(), more, behind=behind, lasting=False)

    def reserve(self) -> None:
        self._saver.reserve(self._pieces())

    def close(self) -> None:
        self._saver.close()

    def _writer(self) -> dict[str, int]:
        """The rank that writes each weight and its state."""
        return shared_out({name: shape.numel() for name, shape in self.shapes.items()}, self.world.world_size)

    def _pieces(self) -> list[Piece]:
        """This rank's, in the order of `_gathered`."""
        writer = self._writer()
        own = [name for name in self.shapes if writer[name] == self.world.rank]
        keys = [(name, f"{slot}.{name}" if slot else name) for name in own for slot in ("", *self.slots)]
        return [
            Piece(key, tuple(self.shapes[n]), (0,) * len(self.shapes[n]), torch.float32) for n, key in keys
        ]

    def _gathered(self) -> Iterator[Tensor]:
        """Collective: this rank's tensors, whole, each gathered when it is asked for."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        writer = self._writer()
        for name, parameter in self.trainable.items():
            for slot in ("", *self.slots):
                whole = (
                    safe_get_full_optimizer_state(parameter, slot)
                    if slot
                    else safe_get_full_fp32_param(parameter)
                )
                if writer[name] == self.world.rank:
                    yield whole.view(self.shapes[name])

    def load(self, folder: Path, step: int | None) -> None:
        self._saver.settle()
        slots = self.slots if step is not None else ()
        state = {f"{slot}.{name}": shape for name, shape in self.shapes.items() for slot in slots}
        check_fits(folder, self.shapes, state if step is not None else None)
        if self.loss_scale is not None and step is not None:
            self.loss_scale.load(folder)
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)
        if step is not None:
            self._begin_state(step)
        for names in chunks(self.shapes, LOAD_ELEMENTS):
            keys = [(slot, name) for slot in (None, *slots) for name in names]
            stored = {f"{s}.{name}" if s else name: torch.empty(self.shapes[name]) for s, name in keys}
            read_state(folder, stored)
            for (slot, name), tensor in zip(keys, stored.values(), strict=True):
                self._set(self.trainable[name], tensor, slot)

    def _set(self, parameter: nn.Parameter, value: Tensor, slot: str | None) -> None:
        """This rank's part of a whole tensor into DeepSpeed's flat buffers, and into the weight itself."""
        from deepspeed import utils

        if self.sharded:
            size, start = parameter.ds_tensor.numel(), parameter.ds_tensor.numel() * self.world.rank  # type: ignore[attr-defined]
            part = value.flatten()[start : start + size]
            part = F.pad(part, (0, size - len(part)))
            if slot is not None:
                utils.safe_set_local_optimizer_state(parameter, part, slot)
                return
            utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)  # type: ignore[attr-defined]
            if parameter.numel():  # small ones are kept whole on every rank
                parameter.data.copy_(value)
        elif slot is not None:
            utils.safe_set_full_optimizer_state(parameter, value, slot)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def reset_optimizer(self) -> None:
        self._saver.settle()
        self._begin_state(0)

    def _begin_state(self, step: int) -> None:
        self.engine.optimizer.optimizer.state.clear()
        self._fill_state(step)
        self._link_slots()

    def gather_full(self, parameter: nn.Parameter) -> Tensor:
        if not self.sharded:
            return parameter
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 buffers that the optimizer steps."""
        optimizer = self.engine.optimizer
        flat = (
            optimizer.fp32_partitioned_groups_flat
            if self.sharded
            else optimizer.single_partition_of_fp32_groups
        )
        return list(flat)

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's group, with its options, of each of those buffers."""
        optimizer = self.engine.optimizer
        groups: list[dict[str, Any]] = optimizer.optimizer.param_groups
        if not self.sharded:
            return groups
        return [groups[optimizer.sub_group_to_group_id[i]] for i in range(len(self._flat_partitions()))]

    def _fill_state(self, step: int) -> None:
        """The optimizer's state after `step` steps, where there is none."""
        inner = self.engine.optimizer.optimizer
        for flat, group in zip(self._flat_partitions(), self._groups(), strict=True):
            if not inner.state.get(flat):
                inner.state[flat] = fresh_state(inner, group, flat, step)

    def _link_slots(self) -> None:
        """Stages 1 and 2 find a parameter's state only after this; on its own DeepSpeed 0.19 does it
        for the first parameter group alone.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

        if not self.sharded:
            optimizer = self.engine.optimizer
            for parameters, flat in zip(optimizer.bit16_groups, self._flat_partitions(), strict=True):
                link(parameters, flat, optimizer.optimizer.state)


def flat_slots(optimizer: Optimizer, device: torch.device) -> tuple[str, ...]:
    """What the optimizer keeps for each weight, by slot.

    Raises JobError for one that cannot step parts of flattened weights, which is all that DeepSpeed gives it:
    its state must be one value per weight, whatever the tensor's shape. State of other shapes would need ways
    of its own to be saved and loaded here.
    """
    matrix = torch.zeros(64, 128, device=device)  # large enough for 8-bit optimizers to quantize
    kept = set()
    for group in optimizer.param_groups:
        for tensor in (matrix, matrix.flatten()):
            try:
                slots = slots_of("a weight", tensor, fresh_state(optimizer, group, tensor, step=0))
            except ValueError as error:  # such as Muon's, for anything but a matrix
                raise _not_under_zero(optimizer, str(error)) from error
            for slot, value in slots.items():
                if value.shape != tensor.shape:
                    shape = f"its {slot} of a {tuple(tensor.shape)} tensor is {tuple(value.shape)}"
                    raise _not_under_zero(optimizer, shape)
            kept.add(tuple(slots))
    if len(kept) != 1:
        raise _not_under_zero(optimizer, f"what it keeps depends on the tensor: {sorted(kept)}")
    return kept.pop()


def _not_under_zero(optimizer: Optimizer, why: str) -> JobError:
    return JobError(
        f"{type(optimizer).__name__} does not work under DeepSpeed ZeRO",
        where="strategy.name",
        why=f"ZeRO steps parts of flattened weights, whose state must have their shape; {why}",
        fix="take strategy: {name: ddp}",
    )


def check_deepspeed(job: Job) -> None:
    """Raises JobError for a key or value in the job's zero_optimization that DeepSpeed does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**job.deepspeed()["zero_optimization"])
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        raise JobError(
            f"DeepSpeed does not take its configuration: {'; '.join(problems)}",
            where="strategy.config.zero_optimization",
            fix="fix these keys; https://www.deepspeed.ai/docs/config-json names all",
        ) from error


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet. On CPU without its shared-memory operator, which would need a compiler."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
