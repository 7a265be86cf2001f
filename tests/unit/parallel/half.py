"""fp16 on CPU, past the refusal: each strategy on two ranks, its first steps skipped, cut and resumed."""

from __future__ import annotations

from pathlib import Path

from raydist.model import build
from raydist.parallel import own_optimizer, zero
from raydist.parallel.loss_scale import LossScale
from tests.unit.parallel.matrix import STRATEGIES, run_cases

QUICK = [("ddp", "full", "fp16"), ("fsdp", "full", "fp16"), ("zero-2", "full", "fp16")]
REST = [(name, "full", "fp16") for name in STRATEGIES if name not in {case[0] for case in QUICK}]
CASES = [*QUICK, *REST, ("ddp", "lora", "fp16")]
SKIPPED, FITS = 2, 2.0**14


class Hurried(LossScale):
    """Too large for the first steps, then small enough for every strategy, each of which has its limit."""

    def accepts(self, norm: float) -> bool:
        taken = super().accepts(norm)
        if self.skipped == SKIPPED:
            self.scale = FITS
        return taken


def past_the_refusal(scale: type[LossScale] = Hurried, first: float = 2.0**40) -> None:
    """In this process fp16 runs on CPU; by default its first steps overflow."""
    build.check_precision = lambda *_, **__: None
    for module in (own_optimizer, zero):
        module.loss_scale_for = lambda precision: scale(first) if precision == "fp16" else None


def run_half(folder: Path, cases: list[tuple[str, str, str]]) -> None:
    past_the_refusal()
    run_cases(folder, cases)
