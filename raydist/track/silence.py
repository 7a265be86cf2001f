"""Whether a run makes no progress: from its ranks' signs of life, against what a step usually takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raydist.folder import RunFolder
from raydist.track.humanize import duration
from raydist.track.records import read_metrics
from raydist.training.beat import BEAT_SECONDS, Beat, read_beats

MUTE_SECONDS = 5 * BEAT_SECONDS
TIMES, LEAST_SECONDS = 10, 30.0
MOST_SECONDS = 240.0
"""Before the collectives' own limit of 300 s ends the attempt, and where nobody knows what is usual."""


@dataclass(frozen=True)
class Silence:
    """seconds: without progress of any rank.  usual: seconds of a step; None outside of steps.

    mute: ranks without any sign of life.
    """

    seconds: float
    usual: float | None
    phase: str
    mute: tuple[int, ...]
    beats: tuple[Beat, ...]

    @property
    def is_long(self) -> bool:
        if self.usual is None:
            return self.seconds > MOST_SECONDS
        return self.seconds > max(LEAST_SECONDS, min(TIMES * self.usual, MOST_SECONDS), 2 * self.usual)

    def text(self, stacks: Path) -> str:
        """One line for people. stacks: the folder in which the ranks' stacks are."""
        phase = self.phase.replace("_", " ")
        usual = f"no step for {duration(self.seconds)}, and one takes {self.usual or 0:.3g} s"
        said = f"no progress for {duration(self.seconds)} in {phase}" if self.usual is None else usual
        if self.mute:
            who = f"rank{'s' * (len(self.mute) > 1)} {', '.join(map(str, self.mute))}"
            said += f"; {who} gave no sign of life for {MUTE_SECONDS:.0f} s: stopped, or the host is gone"
        return f"{said}; stacks in {stacks}"


def silence(
    folder: RunFolder, attempt: int, step_seconds: Sequence[float], *, now: float | None = None
) -> Silence | None:
    """None where no rank of the attempt is there. step_seconds: of recent steps."""
    beats, now = read_beats(folder.ranks(attempt)), time.time() if now is None else now
    if not beats:
        return None
    ages = {beat.rank: max(now - beat.time, 0.0) for beat in beats}
    least = min(beats, key=lambda beat: beat.quiet_seconds + ages[beat.rank])
    usual = statistics.median(step_seconds) if step_seconds and least.phase == "steps" else None
    mute = tuple(rank for rank, age in ages.items() if age > MUTE_SECONDS)
    return Silence(least.quiet_seconds + ages[least.rank], usual, least.phase, mute, tuple(beats))


def silence_now(folder: RunFolder) -> str | None:
    """What `raydist status` says of a run that makes no progress; None for one that does."""
    attempt = folder.next_attempt() - 1
    seconds = [record["step_seconds"] for record in read_metrics(folder)[-50:] if "step_seconds" in record]
    found = silence(folder, attempt, seconds)
    return found.text(folder.ranks(attempt)) if found is not None and found.is_long else None
