"""PyTorch's process group, on the network that Ray uses.

A module of its own: Ray Train's controller imports it, and need not import torch or the training for that.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

SHUTDOWN_SECONDS = 30


@dataclass
class BetweenHosts(BackendConfig):
    """In place of Ray's TorchConfig, which imports torch into the controller: 2 s and 400 MB.

    Left alone, gloo takes the interface that the host's name resolves to: on many systems the loopback,
    where no other host can be reached.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        return _OnRaysNetwork

    @property
    def train_func_context(self) -> type[Any]:
        return _OnItsDevice


class _OnItsDevice:
    """The training function runs on its worker's GPU, if it has one."""

    def __enter__(self) -> None:
        import torch

        if torch.cuda.is_available():
            from ray.train.torch import get_device

            device = get_device()
            if isinstance(device, torch.device) and device.type == "cuda":
                torch.cuda.set_device(device)

    def __exit__(self, *error: object) -> None:
        return


class _OnRaysNetwork(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BetweenHosts) -> None:  # type: ignore[override]
        address, port = worker_group.execute_single(0, get_address_and_port)
        group = {"backend": backend_config.backend, "timeout_s": backend_config.timeout_s}
        size = len(worker_group)
        ranks = range(size)
        ray.get([worker_group.execute_single_async(n, _join, address, port, n, size, **group) for n in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: BetweenHosts) -> None:  # type: ignore[override]
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=SHUTDOWN_SECONDS)


# --- on a worker

import_seconds = 0.0
"""What the imports of this process took."""


def _join(address: str, port: int, rank: int, size: int, *, backend: str, timeout_s: int) -> None:
    """All ranks import the training at once, before they wait for each other."""
    global import_seconds
    began = time.perf_counter()
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    import raydist.cluster.worker  # noqa: F401 - for the training function

    import_seconds = time.perf_counter() - began
    _choose_interface()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, size, "env://", timeout_s)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_interface() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
