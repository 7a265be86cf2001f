"""Each strategy and optimizer saves the same state twice, at once and behind training, and goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from raydist.parallel import build, fsdp
from raydist.parallel.world import World
from raydist.training import loop
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from tests.train_parts import LLAMA, make_spec
from tests.unit.parallel.matrix import METHODS, STRATEGIES

CASES: dict[str, dict[str, Any]] = {
    **{name: {"strategy": how} for name, how in STRATEGIES.items()},
    **{f"ddp-{name}": {"train": {"optimizer": name}} for name in ("adamw_8bit", "adafactor", "muon")},
    "fsdp-muon": {"strategy": STRATEGIES["fsdp"], "train": {"optimizer": "muon"}},
    "fsdp-lora": {"strategy": STRATEGIES["fsdp"], **METHODS["lora"]},
    "zero-3-lora": {"strategy": STRATEGIES["zero-3"], **METHODS["lora"]},
    "replicated": {},
}
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 96}
"""Some of its tensors are large enough for 8-bit state."""


class Twice(Hook):
    """After the second step; what is behind is still being written while the third is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.step != 2:
            return
        for name in ("behind", "at-once"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        attempt.world.barrier()
        self._handle = attempt.strategy.save(self.folder / "behind", behind=True)
        at_once = attempt.strategy.save(self.folder / "at-once", behind=False)
        assert at_once.done()
        self._expected = at_once.files

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        assert self._handle.done(within=60)
        assert self._handle.files == self._expected


def run_saves(folder: Path, cases: list[str]) -> None:
    """On as many ranks as there are; FOLDER/<case>-<ranks> gets both."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo")
    for case in cases:
        loop.make_strategy = replicated if case == "replicated" else build.make_strategy
        saved = folder / f"{case}-{size}"
        sections = {**CASES[case], "train": {**CASES[case].get("train", {}), "max_steps": 3}}
        spec = make_spec(
            folder,
            world_size=size,
            run=f"run-{case}-{size}",
            model={"base": str(folder / "base"), "config": None, "tokenizer": None}
            if "adapter" in sections
            else {"config": WIDE},
            eval={"eval_steps": 100, "max_tokens": 100},
            **sections,
        )
        train(spec, World(rank, size), hooks=[Twice(saved)])


def replicated(model: nn.Module, job: Any, world: World, accumulation_steps: int) -> Any:
    return fsdp.Replicated(model, job, world)


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files, put together of its boxes, which must cover it once."""
    boxes: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            offsets = json.loads(stored.metadata()["DCP_SHARDING_INFO"])
            for key in stored.keys():  # noqa: SIM118 - it is no mapping
                boxes.setdefault(key, []).append((offsets[key]["saved_offsets"], stored.get_tensor(key)))
    state = {}
    for key, parts in boxes.items():
        ends = [[at + n for at, n in zip(offset, part.shape, strict=True)] for offset, part in parts]
        shape = [max(each) for each in zip(*ends, strict=True)]
        state[key] = torch.zeros(shape, dtype=parts[0][1].dtype)
        assert sum(part.numel() for _, part in parts) == state[key].numel(), key
        for offset, part in parts:
            place = tuple(slice(at, at + n) for at, n in zip(offset, part.shape, strict=True))
            state[key][place] = part
    return state
