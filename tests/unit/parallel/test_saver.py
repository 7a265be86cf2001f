"""What each rank writes of a checkpoint, and that it is the same at once and behind training."""

from __future__ import annotations

import functools
import json
import pickle
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from raydist.errors import TrainingError
from raydist.files import measure
from raydist.parallel.saver import Saver
from raydist.parallel.share import file_name, share_of, shared_out
from raydist.parallel.state import read_state
from raydist.parallel.world import World
from tests.train_parts import LLAMA, finish, fork_ranks
from tests.unit.model.test_adapter import write_base
from tests.unit.parallel.saves import CASES, run_saves, whole_state

STATE = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "matrix": torch.arange(6.0).view(2, 3),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "half": torch.arange(5).to(torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def header_of(path: Path) -> tuple[dict[str, object], int]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), len(content) - 8 - length


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("behind", [False, True])
def test_the_file_is_as_torchs_distributed_checkpoints_write_it(tmp_path: Path, behind: bool) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    share = share_of(STATE, 0, 1)
    more = {"more.json": b"{}\n"}
    saved = Saver(World()).save(ours, [*share], share.values(), more, behind=behind, lasting=True)
    assert saved.done(within=60)
    assert saved.files == {path.name: measure(path) for path in ours.iterdir()}
    assert set(saved.files) == {file_name(0), "more.json"}
    contiguous = {key: tensor.contiguous() for key, tensor in STATE.items()}
    writer = HuggingFaceStorageWriter(str(theirs), save_distributed=True)
    state_dict_saver.save(contiguous, storage_writer=writer, no_dist=True)
    (written,) = theirs.iterdir()
    assert written.name == file_name(0)
    (found, size), (expected, their_size) = header_of(ours / file_name(0)), header_of(written)
    assert size == their_size and found.keys() == expected.keys()
    metadata, their_metadata = found.pop("__metadata__"), expected.pop("__metadata__")
    assert isinstance(metadata, dict) and isinstance(their_metadata, dict)
    boxes = [json.loads(each.pop("DCP_SHARDING_INFO")) for each in (metadata, their_metadata)]
    assert boxes[0] == boxes[1] and metadata == their_metadata
    for folder in (ours, theirs):
        into = {key: torch.zeros_like(tensor) for key, tensor in contiguous.items()}
        read_state(folder, into)
        assert all(torch.equal(into[key], tensor) for key, tensor in contiguous.items())


def test_a_dtype_that_has_no_name_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"w is of torch\.complex64"):
        share_of({"w": torch.zeros(2, dtype=torch.complex64)}, 0, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ranks_share_what_all_have_about_equally_and_each_tensor_once(n: int) -> None:
    sizes = {f"layer-{i}": 100 + 7 * i for i in range(40)} | {"embedding": 1500, "scalar": 4}
    taken = shared_out(sizes, n)
    loads = Counter[int]()
    for name, rank in taken.items():
        loads[rank] += sizes[name]
    assert taken.keys() == sizes.keys() and max(loads.values()) - min(loads.values()) <= 110
    state = {name: torch.zeros(size) for name, size in sizes.items()}
    written = [piece.key for rank in range(n) for piece in share_of(state, rank, n)]
    assert sorted(written) == sorted(sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two ranks and on one."""
    folder = tmp_path_factory.mktemp("saves")
    write_base(folder / "base", LLAMA)
    work = folder / "work.pickle"
    work.write_bytes(pickle.dumps(functools.partial(run_saves, folder, [*CASES])))
    finish(fork_ranks(work, 2), seconds=300)
    finish(fork_ranks(work, 1), seconds=300)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_behind_training_the_same_is_saved_as_at_once(saved: Path, case: str) -> None:
    """Each tensor whole, the same bits, on one rank and on two, though training went on meanwhile."""
    kept = {}
    for ranks in (1, 2):
        behind, at_once = (whole_state(saved / f"{case}-{ranks}" / how) for how in ("behind", "at-once"))
        assert behind.keys() == at_once.keys()
        for key, tensor in at_once.items():
            assert torch.equal(behind[key], tensor), key
        kept[ranks] = at_once
    assert kept[1].keys() == kept[2].keys()
    assert {key: tensor.shape for key, tensor in kept[1].items()} == {
        key: tensor.shape for key, tensor in kept[2].items()
    }
    only_adapters = all("lora" in key for key in kept[1])
    assert only_adapters == case.endswith("lora")
