"""The factor that keeps small gradients above the smallest numbers of fp16, as torch.amp.GradScaler sets it.

The backward pass of loss x scale overflows now and then: its gradients are infinite, the step is skipped and
the scale halved. After 2000 good steps in a row it is doubled. All of it follows from the global norm, which
every rank and strategy knows, so no rank can disagree.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from raydist import files
from raydist.errors import TrainingError
from raydist.parallel.world import World

GROWTH_INTERVAL = 2000
MOST_SKIPPED = 20
"""In a row. The scale has then fallen from 65536 below 0.1, so that it is not to blame."""

FILE = "loss_scale.json"


@dataclass
class LossScale:
    """skipped: steps without an update since the start of the run.  good, bad: in a row until now."""

    scale: float = 2.0**16
    skipped: int = 0
    good: int = 0
    bad: int = 0

    def accepts(self, norm: float) -> bool:
        """Whether to take the step with this gradient norm, unscaled; sets the scale of the next step.

        Raises TrainingError after MOST_SKIPPED steps in a row that were not taken.
        """
        if math.isfinite(norm):
            self.good, self.bad = self.good + 1, 0
            if self.good == GROWTH_INTERVAL:
                self.scale, self.good = 2 * self.scale, 0
            return True
        self.scale, self.good = self.scale / 2, 0
        self.skipped, self.bad = self.skipped + 1, self.bad + 1
        if self.bad == MOST_SKIPPED:
            raise TrainingError(
                f"the gradient norm is {norm}",
                why=f"fp16 overflowed in {self.bad} steps in a row, down to a loss scale of {self.scale:g}",
                fix="lower train.lr, or take bf16 or fp32 in a run of another name",
            )
        return False

    def load(self, folder: Path) -> None:
        vars(self).update(files.read_json(folder / FILE))


def loss_scale_for(mixed_precision: str) -> LossScale | None:
    return LossScale() if mixed_precision == "fp16" else None


def written_scale(scale: LossScale | None, world: World) -> dict[str, bytes]:
    """The file of a checkpoint that holds it, by name, as it is now; rank 0 writes it."""
    return {FILE: files.json_bytes(asdict(scale))} if scale is not None and world.is_main else {}
