"""What an attempt does about bad steps: asks its guard, skips them, names their documents, goes back.

    guards.mode: on       gate ─▶ verdict before the step ─ bad ─▶ not taken ─▶ act: record; too many: go back
    guards.mode: record   look ─▶ verdict when the norm is read ─ bad ─▶ record

All of it is collective, and every rank decides by the same numbers: the loss is summed over the ranks, the
gradient norm is rank 0's.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raydist.errors import TrainingError
from raydist.training.guard import Guard, Verdict
from raydist.training.suspects import Suspects, find_suspects, losses_of

if TYPE_CHECKING:
    from raydist.feed.loader import Step
    from raydist.parallel.strategy import Take
    from raydist.training.checkpoint import Commit, Position
    from raydist.training.loop import Attempt
    from raydist.training.norms import Taken


class Skips:
    def __init__(self, attempt: Attempt) -> None:
        self._attempt, self._settings = attempt, attempt.job.guards
        self.guard = Guard(self._settings)
        self._refused: tuple[Taken, Verdict] | None = None

    @property
    def refused(self) -> bool:
        """Whether the step that was just made was not taken; until `act`."""
        return self._refused is not None

    def gate(self, step: Taken) -> Take | None:
        """For `Strategy.update`; None where no step is refused."""
        if self._settings.mode != "on":
            return None

        def take(norm: float) -> bool:
            verdict = self._judge(step, norm)
            if verdict.reason:
                self._refused = step, verdict
                self.guard.in_a_row += 1
            else:
                self.guard.took(verdict)
            return not verdict.reason

        return take

    def look(self, step: Taken, norm: float) -> None:
        """At a step that was taken. Spikes are part of what the next steps are compared with, here alone."""
        verdict = self._judge(step, norm)
        self.guard.took(verdict)
        if verdict.reason:
            with self._attempt.phases.during("skipping"):
                self._record(step, verdict, self._suspects(step), action="recorded")

    def act(self, finish_commit: Callable[[], None]) -> None:
        """Record the step that was refused, if it was; after too many of them go back.

        finish_commit: waits for a checkpoint that is being written, so that it is known what there is.
        Raises TrainingError where a run has gone back too often already.
        """
        if self._refused is None:
            return
        (step, verdict), self._refused = self._refused, None
        with self._attempt.phases.during("skipping"):
            suspects = self._suspects(step)
            if self.guard.in_a_row < self._settings.max_skipped:
                self._record(step, verdict, suspects, action="skipped")
            elif self.guard.rollbacks < self._settings.max_rollbacks:
                self._record(step, verdict, suspects, action="rolled back", **self._go_back(finish_commit))
            else:
                self._record(step, verdict, suspects, action="skipped")
                raise self._given_up(step, verdict, suspects)

    def remembered(self, *, due: bool) -> Position:
        """The attempt's position, with what its guard knows. A checkpoint of it is about to be written.

        due: whether it is by itself. Skipped steps lead back to such a one alone: it is there whether the run
        was stopped on its way or not.
        """
        attempt = self._attempt
        if self._settings.mode == "off":
            return replace(attempt.position, guards=None)
        if self.guard.in_a_row == 0 and due:
            self.guard.back_to = attempt.step
        return replace(attempt.position, guards=self.guard.to_json())

    def resume(self, found: Commit | None) -> None:
        """found: what the attempt goes on from."""
        if found is not None and found.guards is not None:
            self.guard.load(found.guards)
        elif found is not None:
            self.guard.back_to = found.step

    def _judge(self, step: Taken, norm: float) -> Verdict:
        batch, world, stages = _batch_of(step), self._attempt.world, self._attempt.plan.stages
        loss, norm = world.sum_floats([step.loss.item(), norm if world.is_main else 0.0])
        begins = [0, *itertools.accumulate(stage.samples for stage in stages[:-1])]
        size = stages[bisect.bisect_right(begins, batch.start) - 1].global_batch_size
        is_short = batch.stop - batch.start < size
        return self.guard.judge(loss, norm, batch.micro_batches[0]["labels"].shape[1], is_short=is_short)

    def _suspects(self, step: Taken) -> Suspects | None:
        """On rank 0; None on the others."""
        attempt, batch = self._attempt, _batch_of(step)
        losses = losses_of(attempt, batch)
        if not attempt.world.is_main:
            return None
        feed = attempt.data.feed.grown(batch.stop, lambda: None)  # what was read is there
        return find_suspects(feed, batch.start, losses, self.guard.typical_loss)

    def _record(
        self, step: Taken, verdict: Verdict, suspects: Suspects | None, *, action: str, **more: Any
    ) -> None:
        batch = _batch_of(step)
        if suspects is None:
            return
        self._attempt.record(
            "skip",
            step=step.step,
            action=action,
            reason=verdict.reason,
            loss=verdict.loss,
            grad_norm=verdict.norm,
            loss_score=verdict.loss_score,
            norm_score=verdict.norm_score,
            first_sample=batch.start,
            end_sample=batch.stop,
            documents=suspects.documents,
            more_documents=suspects.more,
            stand_out=suspects.stand_out,
            **more,
        )

    def _go_back(self, finish_commit: Callable[[], None]) -> dict[str, Any]:
        """Weights and optimizer of the last good checkpoint; all samples since then are skipped.

        Where there is none yet, the weights stay as they were before the bad steps, which changed nothing.
        """
        attempt, guard = self._attempt, self.guard
        guard.rollbacks, guard.in_a_row = guard.rollbacks + 1, 0
        finish_commit()
        found = None if guard.back_to is None else attempt.checkpoints.go_back(guard.back_to)
        if found is None:
            return {"back_to": None}
        now = attempt.position
        tokens = now.seen.tokens + now.skipped.tokens - found.seen.tokens - found.skipped.tokens
        skipped = found.skipped.add(found.samples, now.samples, steps=now.step - found.step, tokens=tokens)
        attempt.position = replace(now, seen=found.seen, skipped=skipped)
        if found.guards is not None:
            guard.load_windows(found.guards)
        if now.forgotten != found.forgotten:  # the checkpoint lies before the optimizer was reset
            attempt.reset_optimizer()
        return {"back_to": found.step, "skipped_from": found.samples}

    def _given_up(self, step: Taken, verdict: Verdict, suspects: Suspects | None) -> TrainingError:
        batch, settings = _batch_of(step), self._settings
        named = suspects.documents[:3] if suspects else []
        documents = ", ".join(f"{each['source']}: {each['file']}, row {each['row']}" for each in named)
        return TrainingError(
            f"step {step.step}: {verdict.reason}; {self.guard.in_a_row} steps in a row were skipped, and the"
            f" run went back {self.guard.rollbacks} times before",
            where=f"{self._attempt.folder.path}, samples {batch.start} to {batch.stop - 1}"
            + (f", such as {documents}" if documents else ""),
            why=f"guards.max_skipped is {settings.max_skipped}, guards.max_rollbacks"
            f" {settings.max_rollbacks}; the run stays at its last checkpoint",
            fix=f"look at the text (raydist show RUN --step {step.step}). If it is bad, leave these documents"
            " out in a run of another name; if not, lower train.lr there, or go on with this run and a larger"
            " guards.max_rollbacks or guards.threshold",
        )


def _batch_of(step: Taken) -> Step:
    assert step.batch is not None
    return step.batch
