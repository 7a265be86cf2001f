"""On a GPU: weights in 4 and 8 bits are the numbers that the CPU reads from the same bytes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from raydist.model.build import build_model
from raydist.model.quantized import QuantizedLinear
from raydist.parallel.world import World
from tests.gpu.test_gpu import on_each
from tests.train_parts import make_job
from tests.unit.model.test_quantization import LLAMA, qlora, write_base


@pytest.mark.parametrize(("world", "bits"), on_each(["int4", "int8"]), indirect=["world"])
def test_bytes_are_the_same_numbers_as_on_the_cpu(tmp_path: Path, world: World, bits: str) -> None:
    base = write_base(tmp_path / "base", LLAMA)
    model = build_model(make_job(tmp_path, **qlora(base, bits)), base, world.device)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    for layer in layers:
        on_cpu = copy.deepcopy(layer).cpu()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found, expected = (one.dequantized(dtype).cpu() for one in (layer, on_cpu))
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
