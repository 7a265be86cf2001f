"""A sample of the trained model's text, for the report."""

from __future__ import annotations

from raydist.feed.eval_set import first_held_out
from raydist.folder import RunFolder
from raydist.model.export import continue_text
from raydist.run.dataset import Prepared

PROMPT_TOKENS = 24
NEW_TOKENS = 64


def text_sample(prepared: Prepared, folder: RunFolder) -> dict[str, str] | None:
    """The start of a held-out document, and how the run's model continues it; None if there is none."""
    document = first_held_out(prepared.logs.values(), prepared.job.corpus.holdout)
    if document is None:
        document = first_held_out(prepared.eval_logs.values(), 1.0)
    if document is None:
        return None
    prompt, continuation = continue_text(
        folder.model, document[:PROMPT_TOKENS].tolist(), NEW_TOKENS, bos=prepared.bos
    )
    return {"prompt": prompt, "continuation": continuation}
