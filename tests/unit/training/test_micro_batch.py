"""The largest micro batch that fits: the search, tries that run out of memory, and what a run remembers."""

from __future__ import annotations

import functools
import math
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydist.errors import OutOfMemory
from raydist.files import read_json, write_json
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.parallel.fsdp import Replicated
from raydist.parallel.world import World
from raydist.run.attempts import halved, remembered
from raydist.track.records import read_metrics
from raydist.training import loop
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.data import open_data
from raydist.training.loop import Attempt, train
from raydist.training.micro_batch import Tries, find_micro_batch, largest_that_fits, sizes_up_to
from raydist.training.phases import Phases
from raydist.training.room import HEADROOM, Room
from raydist.training.torchrun import torchrun_world
from tests.train_parts import LLAMA, finish, fork_ranks, losses, make_job, make_spec, run_ranks

# --- the search


def test_a_share_is_cut_into_equal_parts() -> None:
    assert sizes_up_to(12) == [12, 6, 3, 2, 1] and sizes_up_to(1) == [1]
    for most in range(1, 100):
        sizes = sizes_up_to(most)
        assert sizes[-1] == 1 and [-(-most // size) for size in sizes] == sorted(
            {-(-most // s) for s in sizes}
        )


@pytest.mark.parametrize("most", [1, 2, 7, 12, 64])
def test_the_largest_that_fits_is_found_from_every_start(most: int) -> None:
    for start in range(most + 3):
        for limit in range(most + 1):
            asked: list[int] = []

            def fits(size: int, asked: list[int] = asked, limit: int = limit) -> bool:
                asked.append(size)
                return size <= limit

            fitting = [size for size in sizes_up_to(most) if size <= limit]
            assert largest_that_fits(fits, start, most) == (fitting[0] if fitting else None)
            assert len(asked) == len(set(asked)) and asked[0] <= max(start, 1)
            if start == (fitting or [0])[0]:
                assert len(asked) <= 2  # a start that is right costs one more at most


class Linear:
    """A memory in which 100 bytes lie, and a sequence takes 10 more."""

    def __init__(self, available: int) -> None:
        self.available, self.size = available, 0

    def in_use(self) -> int:
        return 100

    def peak_of(self, run: Callable[[], None]) -> int:
        run()
        if 100 + 10 * self.size > self.available:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 100 + 10 * self.size

    def empty(self) -> None:
        self.size = 0


def test_what_cannot_fit_is_not_tried_and_head_room_is_left() -> None:
    memory = Linear(1000)
    tries = Tries(functools.partial(setattr, memory, "size"), memory, lambda: 40)
    assert largest_that_fits(tries.fits, 32, 256) == 64
    assert tries.peaks == {32: 460, 64: 780}  # 128 would take 1420
    memory.available = math.ceil(780 / HEADROOM) - 1
    close = Tries(tries.run, memory, lambda: 40)
    assert largest_that_fits(close.fits, 64, 256) == 32 and close.peaks == {64: 780, 32: 460}
    memory.available = 151  # one sequence may take all
    alone = Tries(tries.run, memory, lambda: 40)
    assert largest_that_fits(alone.fits, 2, 2) == 1 and alone.peaks == {2: 160, 1: 150}


def test_a_strategy_that_could_not_go_on_tries_only_what_will_fit() -> None:
    memory = Linear(1000)
    tries = Tries(functools.partial(setattr, memory, "size"), memory, lambda: 40, survives=False)
    assert largest_that_fits(tries.fits, 8, 256) == 64 and max(tries.peaks) == 64
    memory.available = 800  # 780 would be allowed, but planned are only 736
    careful = Tries(tries.run, memory, lambda: 40, survives=False)
    assert largest_that_fits(careful.fits, 8, 256) == 32 and max(careful.peaks) == 32
    with pytest.raises(torch.OutOfMemoryError):
        Tries(tries.run, memory, lambda: 40, survives=False).fits(256)
    other = Tries(tries.run, memory, lambda: 40, on_all=lambda here: here and len(other.peaks) < 2)
    assert largest_that_fits(other.fits, 8, 256) == 8  # another rank has no room for 16


# --- in an attempt, on the CPU


class Counted(TorchDispatchMode):
    """The bytes of all tensors that a pass makes or looks at; more than `available` at a time is refused."""

    def __init__(self, available: int = 2**50) -> None:
        super().__init__()
        self.available = available
        self._live: dict[StorageWeakRef, int] = {}
        self._peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[StorageWeakRef(storage)] = storage.nbytes()
        self._live = {of: size for of, size in self._live.items() if not of.expired()}
        self._peak = max(self._peak, sum(self._live.values()))
        if self._peak > self.available:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self._peak} bytes")
        return made

    def in_use(self) -> int:
        return 0

    def peak_of(self, run: Callable[[], None]) -> int:
        self._live, self._peak = {}, 0
        with self:
            run()
        return self._peak

    def empty(self) -> None:
        self._live = {}


class Guess(Room):
    """An estimate that is far too low, or far too high."""

    guess = 0

    def needed(self, plan: Any) -> int:
        return self.guess


AUTO = {"micro_batch_size": "auto", "global_batch_size": 12, "max_steps": 4}


def auto_spec(storage: Path, *, run: str = "run", train: Any = None, **more: Any) -> AttemptSpec:
    spec = make_spec(storage, run=run, train={**AUTO, **(train or {})}, **more)
    return replace(spec, find_micro_batch=True)


def start_of(spec: AttemptSpec) -> dict[str, Any]:
    return next(r for r in read_metrics(RunFolder(spec.run)) if r["kind"] == "start")


def begun(spec: AttemptSpec, world: World | None = None) -> Attempt:
    spec.run.mkdir(exist_ok=True)
    return Attempt(spec, world or World(), open_data(spec), Phases("load"))


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    """Bytes that a pass takes, with what comes later, by sequences."""
    spec = auto_spec(tmp_path_factory.mktemp("needs"))
    attempt, room = begun(spec), Guess(spec, None)
    room.guess = 2**60
    find_micro_batch(attempt, room, Counted())
    assert attempt.micro_batch_found is not None and attempt.plan.micro_batches == "12"
    return {size: peak or 0 for size, peak in attempt.micro_batch_found.peaks.items()}


@pytest.mark.parametrize("guess", [0, 2**60], ids=["from above", "from below"])
def test_an_attempt_trains_with_the_largest_that_fits_as_if_the_job_had_named_it(
    tmp_path: Path, needs: dict[int, int], guess: int
) -> None:
    spec = auto_spec(tmp_path)
    attempt, room, memory = begun(spec), Guess(spec, None), Counted(85 * needs[6] // 100)
    room.guess = guess
    seen: list[int] = []

    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(len(batch["sample"]))
        return batch

    attempt.collate = collate
    before = torch.get_rng_state()
    find_micro_batch(attempt, room, memory)
    assert seen == ([12, 6, 3] if guess == 0 else [1, 2, 3])
    assert torch.equal(before, torch.get_rng_state())
    assert all(not p.grad.any() for p in attempt.strategy.module.parameters() if p.grad is not None)
    assert attempt.plan.micro_batches == room.plan.micro_batches == "3"
    assert attempt.plan.global_batch_size == 12 and attempt.plan.samples == spec.plan.samples
    attempt.collate = None
    attempt.fit()
    named = make_spec(tmp_path, run="named", train={**AUTO, "micro_batch_size": 3})
    train(named)
    assert losses(spec.run) == losses(named.run)
    start = start_of(spec)
    assert start["micro_batch_size"] == 3 and start["micro_batch_tokens"] == 3 * 32
    tried = {each["sequences"]: each["bytes"] for each in start["micro_batches_tried"]}
    assert tried[3] == needs[3] and tried.get(12) is None
    folder = RunFolder(spec.run)
    assert remembered(spec.job, folder, "cpu", 1) == 96 and remembered(spec.job, folder, "cuda", 1) is None


def test_stages_have_as_many_tokens_each_and_the_longest_is_tried(tmp_path: Path) -> None:
    stages = [{"block_size": 16, "max_tokens": 400}, {"block_size": 64, "max_tokens": 2000}]
    spec = auto_spec(tmp_path, train={"max_steps": None, "global_batch_size": 6}, stages=stages)
    attempt, room = begun(spec), Guess(spec, None)
    find_micro_batch(attempt, room, Counted(2**21))
    assert attempt.micro_batch_found is not None and attempt.micro_batch_found.peaks.keys() == {6, 3}
    assert attempt.plan.micro_batches == "6, then 3" and attempt.plan.steps == spec.plan.steps


def test_where_not_even_one_fits_the_error_says_what_would(tmp_path: Path) -> None:
    spec = auto_spec(tmp_path)
    room = Room(spec, None)
    with pytest.raises(OutOfMemory, match="micro batches of 1 sequences") as refused:
        find_micro_batch(begun(spec), room, Counted(100_000))
    assert "one sequence of 32 tokens was tried" in refused.value.why
    assert "train.gradient_checkpointing: true (" in refused.value.fix


def test_where_nothing_is_tried(tmp_path: Path) -> None:
    """On CPUs, after a resume, where the job says how many; and under strategies that could not go on."""
    memory, spec = Counted(), auto_spec(tmp_path, train={"max_steps": 1})
    train(spec)
    assert not any("tried" in key for key in start_of(spec))
    for of in (replace(spec, attempt=2), replace(auto_spec(tmp_path, run="known"), find_micro_batch=False)):
        attempt = begun(of)
        find_micro_batch(attempt, Room(of, None), memory)
        assert attempt.micro_batch_found is None and attempt.plan == of.plan
    attempt = begun(auto_spec(tmp_path, run="zero"))
    attempt.job = make_job(tmp_path, strategy={"name": "zero", "stage": 1})
    find_micro_batch(attempt, Room(spec, None), memory)
    assert attempt.plan == attempt.spec.plan and attempt.micro_batch_found is not None
    assert "DeepSpeed" in attempt.micro_batch_found.to_json()["micro_batch_not_tried"]


# --- what a run knows of it


def test_a_run_remembers_what_was_found_and_halves_that(tmp_path: Path) -> None:
    spec = auto_spec(tmp_path, train={"global_batch_size": 64})
    folder, error = RunFolder(spec.run), OutOfMemory("here")
    folder.path.mkdir()
    assert remembered(spec.job, folder, "cuda", 1) is None
    begin = {"kind": "start", "step": 0, "device": "cuda"}
    folder.append_metric({**begin, "attempt": 1, "micro_batch_tokens": 16 * 32})
    folder.append_metric({**begin, "attempt": 2})
    assert (
        remembered(spec.job, folder, "cuda", 1) == 16 * 32 and remembered(spec.job, folder, "cpu", 1) is None
    )
    assert make_plan(spec.job, 1, None, 16 * 32).micro_batches == "16"
    assert halved(spec.job, folder, spec.plan, 1, error) == 8 * 32  # though the plan began with 64
    assert remembered(spec.job, folder, "cuda", 1) == remembered(spec.job, folder, "cpu", 1) == 8 * 32
    with pytest.raises(OutOfMemory):
        halved(spec.job, folder, spec.plan, 3, error)
    folder.append_metric({"kind": "try", "step": 0, "attempt": 3, "micro_batch_tokens": 32 * 32})
    assert halved(spec.job, folder, spec.plan, 3, error) == 16 * 32  # a try that ended the attempt


# --- ranks as processes


def search_with_less_memory_on_rank_1(spec: AttemptSpec, available: int) -> None:
    with torchrun_world() as world:
        attempt, room = begun(spec, world), Guess(spec, None)
        find_micro_batch(attempt, room, Counted(available if world.rank else 2**50))
        assert all(not p.grad.any() for p in attempt.strategy.module.parameters() if p.grad is not None)
        write_json(spec.run / f"{world.rank}.json", {"size": attempt.plan.micro_batch_size})


@pytest.mark.slow
def test_all_ranks_take_what_fits_on_every_one(tmp_path: Path, needs: dict[int, int]) -> None:
    spec = auto_spec(tmp_path, world_size=2, train={"global_batch_size": 24})
    work = tmp_path / "work.pickle"
    available = 85 * needs[6] // 100
    work.write_bytes(pickle.dumps(functools.partial(search_with_less_memory_on_rank_1, spec, available)))
    finish(fork_ranks(work, 2))
    assert [read_json(spec.run / f"{rank}.json")["size"] for rank in range(2)] == [3, 3]


def search_over_fsdp2(spec: AttemptSpec, replicated: bool, guess: int, available: int) -> None:
    """replicated: the strategy that ddp is on GPUs."""
    if replicated:
        loop.make_strategy = lambda model, job, world, _: Replicated(model, job, world)
    with torchrun_world() as world:
        attempt, room = begun(spec, world), Guess(spec, None)
        room.guess = guess
        try:
            find_micro_batch(attempt, room, Counted(available))
            attempt.fit()
        except torch.OutOfMemoryError:
            write_json(spec.run / f"{world.rank}.json", {"ended": room.plan.micro_batch_size})


@pytest.mark.slow
@pytest.mark.parametrize("replicated", [False, True], ids=["fsdp", "replicated"])
def test_ranks_that_need_each_other_go_on_as_if_nothing_had_been_tried(
    tmp_path: Path, needs: dict[int, int], replicated: bool
) -> None:
    strategy = {"name": "ddp" if replicated else "fsdp"}
    sections = {"strategy": strategy, "world_size": 2}
    spec = auto_spec(tmp_path, train={"global_batch_size": 24}, **sections)
    work, available = tmp_path / "work.pickle", 85 * needs[6] // 100

    def search(of: AttemptSpec, guess: int) -> None:
        arguments = (of, replicated, guess, available)
        work.write_bytes(pickle.dumps(functools.partial(search_over_fsdp2, *arguments)))
        finish(fork_ranks(work, 2))

    search(spec, 2**60)
    start = start_of(spec)
    tried = [each["sequences"] for each in start["micro_batches_tried"]]
    assert tried[0] == 1 and start["micro_batch_size"] == tried[-1] > 1
    size = {**AUTO, "global_batch_size": 24, "micro_batch_size": start["micro_batch_size"]}
    named = make_spec(tmp_path, run="named", train=size, **sections)
    if replicated:
        search(replace(named, find_micro_batch=False), 0)
    else:
        run_ranks(named)
    assert losses(spec.run) == losses(named.run)

    ended = auto_spec(tmp_path, run="ended", train={"global_batch_size": 24}, **sections)
    search(ended, 0)
    assert read_json(ended.run / "0.json") == read_json(ended.run / "1.json") == {"ended": 12}
    assert halved(ended.job, RunFolder(ended.run), ended.plan, 1, OutOfMemory("here")) == 6 * 32


SPARE_BYTES = 560 * 2**20
WIDE = {**LLAMA, "intermediate_size": 16_384, "num_hidden_layers": 1}
"""A sequence of 64 tokens takes 4 MiB per tensor of its activations; the weights are small."""


class Host:
    """This process's address space, whose limit alone decides."""

    available = 2**50

    def in_use(self) -> int:
        return 0

    def peak_of(self, run: Callable[[], None]) -> int:
        run()
        return 0

    def empty(self) -> None:
        pass


def search_in_an_address_space(spec: AttemptSpec) -> None:
    attempt, room = begun(spec), Guess(spec, None)
    torch.ones(1, requires_grad=True).backward()  # starts autograd's threads, which need room of their own
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    find_micro_batch(attempt, room, Host())
    attempt.fit()


@pytest.mark.slow
def test_a_process_that_really_runs_out_of_memory_goes_on(tmp_path: Path) -> None:
    spec = auto_spec(
        tmp_path,
        model={"config": WIDE},
        packing={"block_size": 64},
        train={"global_batch_size": 32, "max_steps": 2, "weight_decay": 0.0},
        eval={"max_tokens": 100},
        checkpoint={"asynchronous": False},  # a thread takes 64 MiB of addresses
    )
    work = tmp_path / "work.pickle"
    work.write_bytes(pickle.dumps(functools.partial(search_in_an_address_space, spec)))
    finish(fork_ranks(work, 1))
    start = start_of(spec)
    tried = {each["sequences"]: each["bytes"] for each in start["micro_batches_tried"]}
    assert tried[32] is None and 1 <= start["micro_batch_size"] < 32
    named = make_spec(
        tmp_path, run="named", **spec.job.model_dump(include={"model", "packing", "eval"}, mode="json"),
        train={**spec.job.train.model_dump(mode="json"), "micro_batch_size": 4},
    )  # fmt: skip
    train(named)
    assert [*losses(spec.run).values()] == pytest.approx([*losses(named.run).values()], rel=1e-4)
