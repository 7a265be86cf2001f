"""What a model computes in: bf16, fp16 or fp32, where each can run, and that fp32 is never TF32."""

from __future__ import annotations

import torch

from raydist.errors import JobError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

WHERE = "train.mixed_precision"


def check_precision(mixed_precision: str, device_type: str, *, on_worker: bool = False) -> None:
    """Refuse, before weights are loaded, what cannot run there. on_worker: this process will run it."""
    if mixed_precision == "fp16" and device_type == "cpu":
        raise JobError(
            "fp16 needs GPUs, and the workers are on CPU",
            where=WHERE,
            why="CPUs compute fp16 slower than fp32, and its small range would gain nothing",
            fix="take bf16 or fp32",
        )
    if mixed_precision == "bf16" and device_type == "cuda" and on_worker and not _has_bf16():
        raise JobError(
            f"this GPU, {torch.cuda.get_device_name()}, has no bf16",
            where=WHERE,
            why="its generation is older than Ampere, and emulated bf16 is slower than fp32",
            fix="take fp16",
        )


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def exact_fp32() -> None:
    """From now on products of fp32 matrices are computed in fp32 on GPUs, never in TF32.

    A job that wants speed asks for 16 bits. What stays fp32 in such a job is meant to be exact: rotary angles
    are products of positions, and TF32 has only 11 bits for one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def uses_tf32() -> bool:
    """Whether fp32 products are computed in TF32 as things stand: a user's hook may have allowed it."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
