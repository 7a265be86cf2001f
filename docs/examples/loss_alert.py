"""A hook: says when the loss passes a threshold, and stops the run if it stays there.

In the job: `train: {hooks: ["loss_alert:LossAlert"]}`, with this file in the folder where raydist is called.
"""

from typing import Any

import raydist


class LossAlert(raydist.Hook):
    def __init__(self, threshold: float = 8.0, patience: int = 3) -> None:
        self.threshold, self.patience = threshold, patience
        self.in_a_row = 0

    def on_step(self, attempt: Any, result: Any) -> None:
        if result.loss is None:  # it is read every train.logging_steps only
            return
        self.in_a_row = self.in_a_row + 1 if result.loss > self.threshold else 0
        result.figures["above_threshold"] = self.in_a_row  # in metrics.jsonl and in the trackers
        if self.in_a_row:
            attempt.record("incident", what=f"the loss is {result.loss:.3f}, above {self.threshold:g}")
        if self.in_a_row >= self.patience:
            attempt.request_stop()
