"""Micro batches reach a GPU ahead of their step, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raydist.model.loss import to_device


def copier(device: torch.device) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """For the thread that reads ahead: copies a micro batch to the GPU and returns when it is there.

    What the training stream computes meanwhile goes on. None on CPU, where nothing is copied.
    """
    if device.type != "cuda":
        return None
    stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            made = to_device(batch, device)
        stream.synchronize()
        for tensor in made.values():
            if tensor.is_cuda:
                tensor.record_stream(training)  # its memory is not used again before the step has read it
        return made

    return copy
