"""How long training waits for a checkpoint, and how long it takes to write: raydist, torch.save and DCP.

    behind        raydist, from a copy in host memory, while training goes on
    waiting       raydist with checkpoint.asynchronous: false
    torch_save    torch.save of the same weights and AdamW state, flushed to disk, by a bare loop
    dcp_async     torch.distributed.checkpoint.async_save of the same, by a bare loop that steps meanwhile

All train the same model in one process, on a GPU where there is one, on the same disk, in turn. The stall
of raydist is all that its loop spends on a checkpoint, from the folder to the commit and the removal of old
ones, and what the optimizer waits for the copy. The write ends when the checkpoint counts. `meanwhile` is the
median step while one is written, by the median of other steps: writing takes some of the processor and of the
memory's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raydist.model.build import build_model
from raydist.model.loss import loss_of, to_device
from raydist.parallel.world import World
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit
from raydist.training.data import open_data
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from tests.train_parts import make_spec

BEHIND, WAITING, TORCH, DCP = "behind", "waiting", "torch_save", "dcp_async"
AIMS = {"of a step": 1.0, "of waiting": 0.05}
"""At most: the stall of `behind` by the time of a step, and by the stall of `waiting`."""
UNDISTURBED_STEPS = 3


@dataclass
class Figures:
    """Seconds. The first save of a side is apart: it makes what later ones use again."""

    stalls: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    meanwhile: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "stall": statistics.median(self.stalls[1:] or self.stalls),
            "first_stall": self.stalls[0],
            "write": statistics.median(self.writes[1:] or self.writes),
            "step": statistics.median(self.steps),
            "meanwhile": statistics.median(self.meanwhile) / statistics.median(self.steps)
            if self.meanwhile
            else None,
        }


class Enough(Exception):
    """Ends an attempt once all is measured."""


class Saves(Hook):
    """Asks for a checkpoint after some undisturbed steps, again and again, and measures what it costs."""

    def __init__(self, saves: int) -> None:
        self.found, self._left = Figures(), saves
        self._asked: float | None = None
        self._committed: float | None = None
        self._quiet = self._waited = 0.0
        self._since_save = 0

    def on_start(self, attempt: Attempt) -> None:
        self._last, self._spent = time.perf_counter(), 0.0
        saver: Any = attempt.strategy._saver  # type: ignore[attr-defined]
        settle = saver.settle

        def timed() -> None:
            began = time.perf_counter()
            settle()
            self._waited += time.perf_counter() - began

        saver.settle = timed

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.world.device.type == "cuda":
            torch.cuda.synchronize()  # a step's time is the GPU's
        now, spent = time.perf_counter(), attempt.phases.of("checkpoint")
        step = now - self._last - (spent - self._spent)
        if self._asked is None:
            self._since_save += 1
            if attempt.step > 2:  # the first ones make the optimizer's state, and touch the copy's memory
                self.found.steps.append(step)
        elif self._committed is None or attempt.checkpoints.behind:
            self.found.meanwhile.append(step)
        if self._asked is not None and self._committed is not None:
            self.found.stalls.append(spent - self._quiet + self._waited)
            self.found.writes.append(self._committed - self._asked)
            self._asked, self._since_save, self._left = None, 0, self._left - 1
            if not self._left:
                raise Enough
        if self._asked is None and self._since_save > UNDISTURBED_STEPS:
            attempt.request_commit()
            self._asked, self._committed, self._quiet, self._waited = time.perf_counter(), None, spent, 0.0
        self._last, self._spent = time.perf_counter(), spent

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        self._committed = time.perf_counter()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        made = {run: spec_of(options, folder, run) for run in (BEHIND, WAITING)}
        world = World(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
        found = {run: raydist_saves(spec, world, options.saves) for run, spec in made.items()}
        bare = Bare(made[BEHIND], world.device)
        found[TORCH] = bare.saves(options.saves, folder, torch_save)
        found[DCP] = bare.saves(options.saves, folder, dcp_async)
    tell(bare, found, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="of a Llama (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="its width (default: %(default)s)")
    parser.add_argument("--block", type=int, default=128, help="tokens a step (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=2, help="of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: all)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def spec_of(options: argparse.Namespace, folder: Path, run: str) -> AttemptSpec:
    heads = max(1, options.hidden // 64)
    config = {
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.block,
    }
    return make_spec(
        folder,
        run=run,
        model={"config": config},
        packing={"block_size": options.block},
        train={"max_steps": 10**6, "global_batch_size": 1, "lr": 1e-4, "logging_steps": 10**6},
        checkpoint={"save_steps": 10**6, "asynchronous": run == BEHIND, "save_total_limit": 1},
        eval={"eval_steps": 10**6, "max_tokens": 1},
    )


def raydist_saves(spec: AttemptSpec, world: World, saves: int) -> Figures:
    measuring = Saves(saves)
    try:
        train(spec, world, hooks=[measuring])
    except Enough:
        return measuring.found
    raise AssertionError("the run ended before all was measured")


class Bare:
    """A plain loop on the same model and batch, whose checkpoints are whatever it is given."""

    def __init__(self, spec: AttemptSpec, device: torch.device) -> None:
        self.model: Any = build_model(spec.job, spec.tokenizer, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        sizes = {"global_batch_size": 1, "micro_batch_size": 1}
        (step,) = open_data(spec).feed.loader(0, 1, 0, 1, **sizes)
        (batch,), self._labels, self._device = step.micro_batches, step.n_labels, device
        self._batch = to_device(batch, device)
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        self.step()

    def step(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        (loss_of(self.model, self._batch) / self._labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def saves(self, saves: int, folder: Path, save: Callable[[Bare, Path], Callable[[], bool]]) -> Figures:
        """save: begins one, and gives what says whether it is on disk."""
        found = Figures(steps=[self.step() for _ in range(UNDISTURBED_STEPS)])
        for number in range(saves):
            began = time.perf_counter()
            done = save(self, folder / f"{save.__name__}-{number}")
            found.stalls.append(time.perf_counter() - began)
            while not done():
                found.meanwhile.append(self.step())
            found.writes.append(time.perf_counter() - began)
        return found


def torch_save(bare: Bare, path: Path) -> Callable[[], bool]:
    with path.open("wb") as stream:
        torch.save({"model": bare.model.state_dict(), "optimizer": bare.optimizer.state_dict()}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return lambda: True


def dcp_async(bare: Bare, path: Path) -> Callable[[], bool]:
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    state = {"model": bare.model.state_dict(), "optimizer": bare.optimizer.state_dict()}
    written: Any = state_dict_saver.async_save(state, checkpoint_id=str(path))
    return lambda: bool(written.done())


def tell(bare: Bare, found: dict[str, Figures], *, as_json: bool) -> None:
    sides = {name: figures.to_json() for name, figures in found.items()}
    stall = sides[BEHIND]["stall"]
    ratios = {"of a step": stall / sides[BEHIND]["step"], "of waiting": stall / sides[WAITING]["stall"]}
    if as_json:
        print(json.dumps({"parameters": bare.n_parameters, "seconds": sides, "ratios": ratios, "aims": AIMS}))
        return
    print(f"{bare.n_parameters:,} parameters, {12 * bare.n_parameters / 1e9:.3g} GB a checkpoint")
    for name, each in sides.items():
        slower = f"  steps meanwhile x {each['meanwhile']:.2f}" if each["meanwhile"] else ""
        print(
            f"{name:11} stall {each['stall']:8.3f} s (the first {each['first_stall']:.3f})"
            f"  write {each['write']:7.2f} s  step {each['step']:6.3f} s{slower}"
        )
    for name, each in sides.items():
        if name != BEHIND:
            print(f"behind / {name:11} stall {stall / each['stall']:.4f}")
    for name, aim in AIMS.items():
        print(f"the stall of behind {name:10} {ratios[name]:.4f}  (aim: at most {aim})")


if __name__ == "__main__":
    main()
