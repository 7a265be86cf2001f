"""DeepSpeed ZeRO: stage 1 shards the optimizer's state, 2 the gradients as well, 3 the weights too.

DeepSpeed's engine clips and steps. Its checkpoints are not used: they are pickles, and bound to one
number of ranks. Ours are made with its functions to read and write sharded state.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raydist.errors import JobError
from raydist.job.schema import Job
from raydist.model.loss import loss_of
from raydist.parallel.optimizer import make_optimizer, refuse_non_finite, set_learning_rate
from raydist.parallel.state import MOMENTS, check_fits, chunks, fresh_moments, read_state, write_state
from raydist.parallel.strategy import Saved, SaveHandle
from raydist.parallel.weights import materialize
from raydist.parallel.world import World

LOAD_ELEMENTS = 2**28
"""Read from a checkpoint at once: 1 GiB of fp32."""


class Zero:
    """Weights, gradients and moments are fp32; DeepSpeed keeps them in flat buffers."""

    def __init__(self, model: nn.Module, job: Job, world: World, accumulation_steps: int) -> None:
        self.module, self.world, self.sharded = model, world, job.strategy.stage == 3
        world.ensure_group()
        deepspeed = import_deepspeed(world.device)
        if self.sharded:
            materialize(model)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trainable.items()}
        optimizer = make_optimizer(model, job.train.weight_decay)
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

    def update(self, lr: float, max_grad_norm: float | None) -> float:
        """DeepSpeed clips to the job's norm within its step: a bad norm is found after it.

        Nothing of that step is kept: the error ends the attempt.
        """
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.step()
        return refuse_non_finite(float(self.engine.get_global_grad_norm()))

    def save(self, folder: Path) -> SaveHandle:
        """Gathered a tensor at a time; each rank keeps and writes its share of them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_moments()
        state = {}
        for index, (name, parameter) in enumerate(self.trainable.items()):
            whole = {name: safe_get_full_fp32_param(parameter)}
            whole |= {f"{m}.{name}": safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
            if index % self.world.world_size == self.world.rank:
                state.update({key: tensor.view(self.shapes[name]).cpu() for key, tensor in whole.items()})
        write_state(folder, state)
        return Saved()

    def load(self, folder: Path, step: int | None) -> None:
        check_fits(folder, self.shapes)
        if step is not None:
            for flat in self._flat_partitions():
                self.engine.optimizer.optimizer.state[flat] = fresh_moments(flat.detach(), step)
            self._link_moments()
        for names in chunks(self.shapes, LOAD_ELEMENTS):
            kinds: tuple[str | None, ...] = (None,) if step is None else (None, *MOMENTS)
            keys = [(kind, name) for kind in kinds for name in names]
            stored = {f"{m}.{name}" if m else name: torch.empty(self.shapes[name]) for m, name in keys}
            read_state(folder, stored)
            for (moment, name), tensor in zip(keys, stored.values(), strict=True):
                self._set(self.trainable[name], tensor, moment)

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """This rank's part of a whole tensor into DeepSpeed's flat buffers, and into the weight itself."""
        from deepspeed import utils

        if self.sharded:
            size, start = parameter.ds_tensor.numel(), parameter.ds_tensor.numel() * self.world.rank  # type: ignore[attr-defined]
            part = value.flatten()[start : start + size]
            part = F.pad(part, (0, size - len(part)))
            if moment is not None:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
                return
            utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)  # type: ignore[attr-defined]
            if parameter.numel():  # small ones are kept whole on every rank
                parameter.data.copy_(value)
        elif moment is not None:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

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

    def _link_moments(self) -> None:
        """Stages 1 and 2 find a parameter's moments only after this; on its own DeepSpeed 0.19 does it
        for the first parameter group alone.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

        if not self.sharded:
            optimizer = self.engine.optimizer
            for parameters, flat in zip(optimizer.bit16_groups, self._flat_partitions(), strict=True):
                link(parameters, flat, optimizer.optimizer.state)


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
            fix="mend these keys; https://www.deepspeed.ai/docs/config-json names all",
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
