"""What each rank writes of a state that all of them hold together, and the file it writes.

The ranks agree without a word: what lies on several of them alike goes to one of these, the largest first to
the one that has the least so far; of what is sharded, each writes its own part. The file is safetensors with
the boxes of its tensors in the metadata, as torch's distributed checkpoints have them: whoever resumes reads
the rows it needs of whichever files hold them.

    8 bytes: length of the header │ header: JSON │ the pieces, one after another, without gaps
"""

from __future__ import annotations

import heapq
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raydist.errors import TrainingError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""The names that safetensors has for them."""


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `key`, from `offsets` of the whole on."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def file_name(rank: int) -> str:
    """As torch's distributed checkpoints call it."""
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def share_of(state: Mapping[str, Tensor], rank: int, world_size: int) -> dict[Piece, Tensor]:
    """This rank's pieces in the order of its file, each with its local tensor, not a copy.

    state: the same names on every rank; plain tensors are alike on all of them.
    """
    local = {
        key: tensor.to_local() if isinstance(tensor, DTensor) else tensor for key, tensor in state.items()
    }
    by_copies: dict[int, dict[str, int]] = {}
    copy = {key: _copy(tensor, rank, world_size) for key, tensor in state.items()}
    for key, (_, n_copies) in copy.items():
        by_copies.setdefault(n_copies, {})[key] = local[key].nbytes
    writers = {key: who for n, sizes in by_copies.items() for key, who in shared_out(sizes, n).items()}
    own = {_piece(key, state[key]): local[key] for key in state if writers[key] == copy[key][0]}
    there = {piece: tensor for piece, tensor in own.items() if piece.n_bytes or not any(piece.offsets)}
    return dict(sorted(there.items(), key=lambda item: -item[0].dtype.itemsize))  # so that each is aligned


def shared_out(sizes: Mapping[str, int], n: int) -> dict[str, int]:
    """Which of n takes each name, so that they get about as many bytes each."""
    loads = [(0, index) for index in range(n)]
    taken = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, index = heapq.heappop(loads)
        taken[name] = index
        heapq.heappush(loads, (load + sizes[name], index))
    return taken


def _copy(tensor: Tensor, rank: int, world_size: int) -> tuple[int, int]:
    """Which copy of its part of the tensor this rank holds, and how many there are."""
    if not isinstance(tensor, DTensor):
        return rank, world_size
    index, n = 0, 1
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            index, n = index * size + place[dimension], n * size
    return index, n


def _piece(key: str, tensor: Tensor) -> Piece:
    if tensor.dtype not in DTYPES:
        raise TrainingError(
            f"the state cannot be saved: {key} is of {tensor.dtype}",
            why="safetensors has no name for it",
            fix="take another optimizer",
        )
    shape, offsets = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    return Piece(key, tuple(shape), tuple(offsets), tensor.dtype)


def header(pieces: Iterable[Piece]) -> bytes:
    """What a file of these pieces begins with."""
    entries, boxes, at = {}, {}, 0
    for piece in pieces:
        ends = at, at + piece.n_bytes
        entries[piece.key] = {
            "dtype": DTYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": list(ends)
        }  # fmt: skip
        boxes[piece.key] = {"saved_offsets": list(piece.offsets)}
        at = ends[1]
    metadata = {"DCP_SHARDING_INFO": json.dumps(boxes), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
