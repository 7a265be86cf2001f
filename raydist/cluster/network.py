"""PyTorch's process group between hosts.

A module of its own: Ray Train's controller imports it, and need not import the training for that.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class BetweenHosts(TorchConfig):
    """PyTorch's process group on the network that Ray uses.

    Left alone, gloo takes the interface that the host's name resolves to: on many systems the loopback,
    where no other host can be reached.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnRaysNetwork


class _OnRaysNetwork(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
