"""The weights of a base model: loaded, and refused where they are not those of its configuration.

transformers itself decides which tensors fit: it renames and merges the stored ones in many ways. What
does not fit it fills with random weights or leaves out, with a warning at most.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from raydist.errors import ModelError, first_line
from raydist.model.trust import SAFE, check_shards, no_weights, read_adapter_config, read_config

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM
    from transformers import PreTrainedModel

    class CausalModel(PreTrainedModel):
        """What AutoModelForCausalLM loads, for type checkers: transformers' own annotations allow no call."""

        def eval(self) -> Self: ...
        def generate(self, *inputs: Any, **options: Any) -> Any: ...


_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
"""Causal masks in checkpoints of old GPTs, also where transformers no longer has such a buffer."""

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that Git LFS has left in place of the real one."""

_SHOWN = 3


def load_base(base: str, where: str = "model.base", **options: Any) -> CausalModel:
    """The model in `base`, a folder or a hub id, by from_pretrained with `options`.

    where: for the error.  Raises ModelError when a tensor is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM

    check_stored(base, where, download=True)  # on loading, the shapes of quantized weights are not compared
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **SAFE}
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, config=read_config(base, where), **options)
    model: CausalModel
    model, info = loaded
    _check(model, info, base, where)
    return model


def load_adapter(model: nn.Module, folder: Path) -> PeftModelForCausalLM:
    """`model` with the adapter in `folder`, by peft. Raises ModelError when its tensors do not fit."""
    from peft import PeftModelForCausalLM

    config = read_adapter_config(folder)
    config.inference_mode = True
    adapted = PeftModelForCausalLM(model, config)
    found = adapted.load_adapter(str(folder), "default")  # from_pretrained only warns of what is missing
    problems = [*_named("missing", found.missing_keys), *_named("unexpected", found.unexpected_keys)]
    if problems:
        raise ModelError(
            "the adapter's tensors are not those of its adapter_config.json",
            where=str(folder),
            why="; ".join(problems),
            fix="restore the folder: the files were changed or mixed after training",
        )
    return adapted


def check_stored(base: str, where: str = "model.base", *, download: bool = False) -> None:
    """Raises ModelError when the tensors in `base` do not fit, or hold what is no number.

    They are not loaded.  download: a model is about to be, so only names and shapes are read. A hub id that
    is not in the cache is left to loading, unless `download`. Of a base that is stored quantized the names
    and shapes are those of the quantization, and are left to loading too.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(base, where)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    paths = _weight_files(base, config, where, download=download)
    if kind is None or not paths or getattr(config, "quantization_config", None) is not None:
        return
    stored: dict[str, torch.Tensor] = {}
    for path in paths:
        _refuse_pointer(Path(path), base, where)
        try:
            # "pt" maps the whole file, and fails on a machine too small for it
            with safe_open(path, "np") as header:
                for name in header.keys():  # noqa: SIM118 - it is no dict
                    stored[name] = torch.empty(header.get_slice(name).get_shape(), device="meta")
        except SafetensorError as error:
            raise ModelError(
                f"{Path(path).name} of {base} is cut or damaged",
                where=where,
                why=first_line(error),
                fix="copy the model from its source again",
            ) from error
    options: dict[str, Any] = {"device_map": {"": "meta"}, "dtype": torch.float32}
    options |= {"attn_implementation": "eager", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _conversion_report() as report:
        try:
            model, info = kind.from_pretrained(None, config=config, state_dict=stored, **options)
        except RuntimeError as error:
            if "automatic conversion" not in str(error):
                raise
            names = re.findall(r"^(\S.*?) +\| *CONVERSION", "\n".join(report), re.MULTILINE)
            raise _misfit(base, where, _named("incomplete", names)) from error
    _check(model, info, base, where)
    if not download:
        _check_finite_stored(paths, base, where)


def _refuse_pointer(path: Path, base: str, where: str) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) != LFS_POINTER:
            return
    raise ModelError(
        f"{path.name} of {base} is a Git LFS pointer, not the weights",
        where=where,
        why="the repository was cloned without Git LFS, which leaves its large files out",
        fix="run `git lfs pull` in the base's folder, or copy the model from its source again",
    )


def check_finite(model: nn.Module, base: str, where: str = "model.base") -> None:
    """Raises ModelError, with the names, where a weight is NaN or infinite. Reads every weight once."""
    _refuse_infinite(
        [
            name
            for name, weight in model.named_parameters()
            if weight.is_floating_point() and not bool(weight.isfinite().all())
        ],
        base,
        where,
    )


def _check_finite_stored(paths: Sequence[str], base: str, where: str) -> None:
    """The same for what is stored, without loading it: all of it, or parts of each tensor of a large base."""
    stored = [(path, name, *tensor) for path in paths for name, tensor in _tensors_in(path).items()]
    total = sum(stop - start for _, _, _, start, stop in stored)
    wrong = []
    for path, name, dtype, start, stop in stored:
        kind, exponent = _EXPONENTS.get(dtype, (None, 0))
        if kind is not None and stop > start:
            bits = np.memmap(path, kind, "r", start, ((stop - start) // np.dtype(kind).itemsize,))
            pieces = [bits] if total <= READ_WHOLE else [bits[at : at + PIECE] for at in _evenly(len(bits))]
            if any(((piece & exponent) == exponent).any() for piece in pieces):
                wrong.append(name)
    _refuse_infinite(wrong, base, where)


READ_WHOLE = 4 * 2**30
"""Bytes of a base up to which all of it is read before a run begins: 2 to 4 s."""
PIECE, PIECES = 2**14, 8
"""Of a tensor of a larger one: numbers in a piece, and pieces. Loading reads them all in any case."""
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""A number's exponent in its bits. It is all ones in NaN and infinity, and in nothing else."""


def _evenly(length: int) -> Iterator[int]:
    """Where pieces begin."""
    last = max(length - PIECE, 0)
    return iter({round(last * n / (PIECES - 1)) for n in range(PIECES)})


def _tensors_in(path: str) -> dict[str, tuple[str, int, int]]:
    """Of a safetensors file: each tensor's dtype, as the format names it, and its bytes, from and to."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begins = 8 + length
    return {
        name: (entry["dtype"], *(begins + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def stored_dtype(base: str, where: str = "model.base") -> torch.dtype | None:
    """That of the weights in `base`, as transformers takes it: of the first that is a floating number."""
    paths = _weight_files(base, read_config(base, where), where, download=True)
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    kinds = (names.get(dtype) for path in paths for dtype, _, _ in _tensors_in(path).values())
    return next((kind for kind in kinds if kind is not None), None)


def _refuse_infinite(wrong: list[str], base: str, where: str) -> None:
    if wrong:
        raise ModelError(
            f"weights of {base} are not numbers",
            where=where,
            why="; ".join(_named("with NaN or infinite values", wrong)),
            fix="copy the model from its source again; a training that diverged leaves such weights too",
        )


def _weight_files(base: str, config: Any, where: str, *, download: bool) -> list[str]:
    """As from_pretrained chooses them; none when they are not on this machine. ModelError for pickles."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    local = not download
    options: dict[str, Any] = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    if (named := getattr(config, "transformers_weights", None)) is not None:
        index = cached_file(base, named, **options) if str(named).endswith(".index.json") else None
        check_shards(base, {"": named} if index is None else _weight_map(index), where)
        return []  # which from_pretrained alone knows
    if type(config).extra_files:
        return []
    if (whole := cached_file(base, SAFE_WEIGHTS_NAME, **options)) is not None:
        return [whole]
    if (index := cached_file(base, SAFE_WEIGHTS_INDEX_NAME, **options)) is None:
        if Path(base).is_dir():
            raise no_weights(Path(base))
        return []
    check_shards(base, _weight_map(index), where)
    try:
        return list(get_checkpoint_shard_files(base, index, local_files_only=local)[0])
    except OSError:
        if download:
            raise
        return []


def _weight_map(index: str) -> dict[str, Any]:
    found = json.loads(Path(index).read_text("utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError(f"{index} has no weight_map")
    named: dict[str, Any] = found["weight_map"]
    return named


def _check(model: nn.Module, info: dict[str, Any], base: str, where: str) -> None:
    """info: from_pretrained's, which leaves out tied heads and what the model's class says to ignore."""
    buffers = {f".{name}" for name, _ in model.named_buffers()}
    unexpected = [
        name
        for name in info["unexpected_keys"]
        if not _MASKS.search(f".{name}") and not any(buffer.endswith(f".{name}") for buffer in buffers)
    ]
    shapes = [f"{name} ({_shape(has)}, not {_shape(asked)})" for name, has, asked in info["mismatched_keys"]]
    problems = [
        *_named("missing", info["missing_keys"]),
        *_named("unexpected", unexpected),
        *_named("of another shape", shapes),
    ]
    if problems:
        raise _misfit(base, where, problems)


def _misfit(base: str, where: str, problems: list[str]) -> ModelError:
    return ModelError(
        f"the weights of {base} do not fit its config.json",
        where=where,
        why=f"transformers would fill these with random values or leave them out: {'; '.join(problems)}",
        fix="restore the base's config.json and *.safetensors, or copy the whole model from its source again",
    )


def _named(what: str, names: Iterable[str]) -> list[str]:
    """One text with the count and the first names, or none."""
    in_order = sorted(
        names, key=lambda name: [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]
    )
    if not in_order:
        return []
    count = f"{len(in_order)} tensor{'s' * (len(in_order) > 1)} {what}"
    return [f"{count}: {', '.join(in_order[:_SHOWN])}{', ...' * (len(in_order) > _SHOWN)}"]


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@contextmanager
def _conversion_report() -> Iterator[list[str]]:
    """What transformers logs: its error says only that the log names the tensors."""
    lines: list[str] = []
    logger, disabled = logging.getLogger("transformers.modeling_utils"), logging.root.manager.disable
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        yield lines
    finally:
        logging.disable(disabled)
        logger.removeHandler(handler)
        logger.propagate = propagate
