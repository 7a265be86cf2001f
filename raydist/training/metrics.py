"""metrics.jsonl: what rank 0 appends while it trains, and how the figures in it are made."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from raydist import files

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense tensor-core peak by a part of the device's name; longer names stand before those they contain."""


class MetricsWriter:
    """Appends records to <run>/metrics.jsonl; on ranks other than 0, not `enabled`, nothing is written."""

    def __init__(self, run: Path, attempt: int, *, enabled: bool = True) -> None:
        self.path, self.attempt, self.enabled = run / "metrics.jsonl", attempt, enabled

    def write(self, kind: str, step: int, **values: Any) -> None:
        if self.enabled:
            record = {"kind": kind, "step": step, **values, "attempt": self.attempt, "time": time.time()}
            files.append_json(self.path, record)


@dataclass
class Clock:
    """Seconds and tokens since the last record, of training alone: `resume` leaves evaluation out."""

    n_steps: int = 0
    n_tokens: int = 0
    wait_seconds: float = 0.0
    busy_seconds: float = 0.0
    _mark: float = field(default_factory=time.perf_counter)

    def waited(self) -> None:
        """The data of the next step has arrived."""
        now = time.perf_counter()
        self.wait_seconds, self._mark = self.wait_seconds + now - self._mark, now

    def stepped(self, n_tokens: int) -> None:
        now = time.perf_counter()
        self.busy_seconds, self._mark = self.busy_seconds + now - self._mark, now
        self.n_steps, self.n_tokens = self.n_steps + 1, self.n_tokens + n_tokens

    def resume(self) -> None:
        self._mark = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Means per step since the last reading, document tokens per second over all ranks; starts anew."""
        seconds, steps = max(self.busy_seconds + self.wait_seconds, 1e-9), max(self.n_steps, 1)
        figures = {
            "tokens_per_second": self.n_tokens / seconds,
            "data_wait_seconds": self.wait_seconds / steps,
            "step_seconds": seconds / steps,
        }
        self.n_steps, self.n_tokens, self.wait_seconds, self.busy_seconds = 0, 0, 0.0, 0.0
        return figures


def mfu(tokens_per_second: float, n_parameters: int, world_size: int, device: torch.device) -> float | None:
    """6 N tokens/s over the peak of all devices; None where the peak is not known, as on CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
    return None if peak is None else 6 * n_parameters * tokens_per_second / (peak * world_size)


def memory_bytes(device: torch.device) -> int:
    """Peak allocated on a GPU; resident memory of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
