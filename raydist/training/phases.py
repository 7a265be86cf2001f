"""Where the seconds of an attempt go: each counts for one phase.

    plan ─▶ prepare ─▶ start ─▶ imports ─▶ load ─▶ probe ─▶ first_step ─▶ steps ─▶ export
    └────── the driver ─────┘  └────── rank 0, with compile, evaluation and checkpoint within ──────┘

plan        the job checked, before Ray is joined
prepare     token logs made; where training begins early, until it can
start       Ray started or joined; from an attempt's plan until rank 0 runs, waiting for nodes included
imports     torch, transformers and the training, into rank 0's process; not told apart without Ray
load        token logs opened; the model built, its attention chosen, spread over ranks; a checkpoint read
probe       micro batches tried, to find the largest that fits
first_step  the attempt's first optimizer step, with the wait for its data
steps       all others
compile     torch.compile, in whichever phase it happens, which does not count it then
evaluation, checkpoint    whenever they happen; a checkpoint as long as training waits for it
skipping    what follows a step that guards refuse
export      model/ written

A new phase needs no more than `with attempt.phases.during("name")`. Seconds are those of the host: a GPU's
pending work counts for the phase that waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PHASES = (
    "plan", "prepare", "start", "imports", "load", "compile", "probe", "first_step", "steps", "evaluation",
    "checkpoint", "skipping", "export",
)  # fmt: skip
"""In the order in which they are shown; others follow them."""


class Phases:
    """A clock that runs for one phase at a time, `first` to begin with. spent: seconds counted before.

    compiling: seconds spent on compiling until now, which count as `compile`, whatever phase runs.
    """

    def __init__(
        self,
        first: str,
        spent: Mapping[str, float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        compiling: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._compiling, self._compiled = compiling, compiling()
        self._clock, self._seconds = clock, dict(spent or {})
        self._running: str | None = first
        self._since = self._heard = clock()
        self._at = 0, 0

    @property
    def now(self) -> tuple[str | None, int, int]:
        """The phase that runs, and how much of it is done, of how much; 0 of 0 where that is not known."""
        return self._running, *self._at

    def begin(self, name: str, done: int = 0, total: int = 0) -> None:
        """The phase that runs ends, and this one does; also again, after others."""
        self._count()
        self._running, self._at = name, (done, total)

    def at(self, done: int, total: int) -> None:
        """How much of the phase that runs is done."""
        self._at = done, total
        self.heard()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A phase within the one that runs, which stands still meanwhile."""
        outer, at = self._running, self._at
        self.begin(name)
        try:
            yield
        finally:
            self._count()
            self._running, self._at = outer, at

    @property
    def running(self) -> str:
        """The phase that runs; empty where the clock stands still."""
        return self._running or ""

    def heard(self) -> None:
        """The work goes on, though no phase begins."""
        self._heard = self._clock()

    def quiet_seconds(self) -> float:
        """Since a phase or another step began, or `heard` was called. May be asked from any thread."""
        return self._clock() - max(self._since, self._heard)

    def of(self, *names: str) -> float:
        """Seconds of these phases up to now."""
        self._count()
        return sum(self._seconds.get(name, 0.0) for name in names)

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, rounded to milliseconds."""
        self._count()
        return {name: round(spent, 3) for name, spent in self._seconds.items()}

    def take(self) -> dict[str, float]:
        """Seconds by phase, which are forgotten here. The clock stands still until the next `begin`."""
        self._count()
        self._running, taken, self._seconds = None, self._seconds, {}
        return taken

    def _count(self) -> None:
        now, compiled = self._clock(), self._compiling()
        took = min(max(compiled - self._compiled, 0.0), now - self._since)
        if self._running is not None:
            self._add(self._running, now - self._since - took)
            if took:
                self._add("compile", took)
        self._since, self._compiled = now, compiled

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
