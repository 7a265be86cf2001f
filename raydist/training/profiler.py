"""A profile of a few steps: where a step's time goes, kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, schedule

from raydist.training.hooks import Hook, StepResult

if TYPE_CHECKING:
    from raydist.training.loop import Attempt

SKIPPED, WARM_UP, RECORDED = 2, 1, 3
"""Steps: the first ones allocate and compile, and the profiler itself has to warm up."""

NEEDED = SKIPPED + WARM_UP + RECORDED


class Profile(Hook):
    """Writes <folder>/rank-N.trace.json of the attempt's steps 4 to 6, for chrome://tracing or Perfetto."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps = 0

    def on_start(self, attempt: Attempt) -> None:
        on_gpu = attempt.world.device.type == "cuda"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=lambda done: self._write(attempt, done),
            record_shapes=True,
        )
        self._profile.start()

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self._steps += 1
        if self._steps <= NEEDED:
            self._profile.step()

    def on_end(self, attempt: Attempt, *, stopped: bool) -> None:
        self._profile.stop()
        if self._steps < NEEDED:
            attempt.record("incident", what=f"no profile: it takes {NEEDED} steps, there were {self._steps}")

    def _write(self, attempt: Attempt, done: Any) -> None:
        if self._steps < NEEDED:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{attempt.world.rank}.trace.json"
        done.export_chrome_trace(str(path))
        attempt.record("incident", what=f"profile of {RECORDED} steps: {path.parent}")
