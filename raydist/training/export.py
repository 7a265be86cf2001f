"""The end of a run: rank 0 writes model/, the last weights or the best evaluated ones.

    the last checkpoint's files ──▶ its commit ──┐
    weights gathered ──▶ model/'s files ─────────┴──▶ model/ in its place

Both are written at a time. What is not there yet when the attempt dies is made again from the last commit.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from raydist.background import in_background
from raydist.bucket import mirror
from raydist.files import measure
from raydist.model.export import full_state, model_files, save_model, saved_dtype
from raydist.training.card import model_card
from raydist.training.checkpoint import Position, best

if TYPE_CHECKING:
    from raydist.training.loop import Attempt


def export(attempt: Attempt) -> None:
    """Collective: also the end of the last commit and of the hooks, before model/ can be seen.

    Everything of `attempt` may be used up by it: nothing is trained afterwards.
    """
    weights = _load_best(attempt) or attempt.position
    job, strategy, main = attempt.job, attempt.strategy, attempt.world.is_main
    dtype = saved_dtype(job) if job.adapter is None else None
    state = full_state(strategy.module, dtype, gather_full=strategy.gather_full, keep=main)
    if not main:
        attempt.end()
        return
    folder, committed = attempt.folder, Future[None]()
    card = model_card(attempt.spec, weights, attempt.data.feed.fingerprint)

    def write() -> None:
        save_model(
            strategy.module, state, job, attempt.spec.tokenizer, folder.model, card, before=committed.result
        )

    writing = in_background(write, "raydist-model")
    try:
        attempt.end()
    except BaseException as error:
        committed.set_exception(error)
        wait([writing])
        raise
    committed.set_result(None)
    writing.result()
    mirror.publish_folder(folder.model)
    folder.write_model_record({path.name: measure(path) for path in model_files(folder.model)})


def _load_best(attempt: Attempt) -> Position | None:
    """The position whose weights the strategy now holds; None when they are the last step's."""
    if not attempt.job.checkpoint.load_best_model_at_end:
        return None
    found = best(attempt.folder) if attempt.world.is_main else None
    newest = attempt.checkpoints.saving  # counts soon, and is no file of the folder yet
    if found and newest and newest.eval_loss is not None and newest.eval_loss <= (found.eval_loss or 0.0):
        found = None
    step = attempt.world.from_main(found.step if found else -1)
    if step in (-1, attempt.step):
        return None
    attempt.record("incident", what=f"model/ is of step {step}, which evaluated best")
    return attempt.checkpoints.load_weights(step)
