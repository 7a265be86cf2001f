"""The hook on micro batches: a function of the user's between the feed and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raydist.errors import TrainingError
from raydist.feed.packing import IGNORED
from raydist.fingerprint import fingerprint
from raydist.job.functions import import_function, source_of

Tensors = dict[str, torch.Tensor]
GIVEN = ("input_ids", "labels", "position_ids", "document_lengths", "sample")
WHERE = "train.collator"


def make_collator(path: str | None) -> Callable[[Tensors], Tensors] | None:
    """The function that `train.collator` names, with checks of what it returns; None where it names none.

    It is called on every micro batch of training, not of evaluation, in the thread that reads ahead. It gets
    tensors on the CPU: input_ids, labels, position_ids, int64 (B, T), document_lengths, int32 (B, T), and
    sample, int64 (B,), -1 for padding (see `Blocks.empty`). It returns a dict of the same shapes. A label may
    become -100, which takes it out of the loss and of the count that the loss is divided by. input_ids may
    have other values, document_lengths may be left out, and further tensors go to the model's forward by
    their names. Anything else is a TrainingError. A resumed run is the same one only if the function depends
    on the batch alone: seed random draws by `sample`.

    Raises JobError if there is no such function.
    """
    if path is None:
        return None
    function = import_function(path, WHERE)

    def collate(batch: Tensors) -> Tensors:
        made = function({name: tensor.clone() for name, tensor in batch.items()})
        if isinstance(made, dict):
            made = {"document_lengths": batch["document_lengths"], **made}
        if problem := _problem(batch, made):
            raise TrainingError(
                f"{path} {problem}",
                where=WHERE,
                why="the hook gets a finished micro batch: it may mask labels (-100) and add keys",
                fix="correct the function; raydist/training/collate.py describes what it gets and returns",
            )
        result: Tensors = made
        return result

    return collate


def collator_fingerprint(path: str) -> str:
    """A hash of the function's source, to see that a resumed run uses the same one; else its name."""
    try:
        return fingerprint(source_of(import_function(path, WHERE)))
    except (TypeError, OSError):
        return path


def _problem(given: Tensors, made: Any) -> str:
    """What is wrong with a collator's result; empty if nothing is."""
    if not isinstance(made, dict) or not all(isinstance(value, torch.Tensor) for value in made.values()):
        return "does not give a dict of tensors"
    for name in ("attention_mask", "past_key_values", "use_cache"):
        if name in made:
            return f"adds {name}: document_lengths and position_ids tell documents apart; mask labels instead"
    for name in GIVEN:
        if name not in made:
            return f"leaves out {name}"
        expected, found = (f"{tuple(t.shape)} of {t.dtype}" for t in (given[name], made[name]))
        if expected != found:
            return f"gives {name} {found}; it got {expected}"
    for name in ("position_ids", "document_lengths", "sample"):
        if not torch.equal(given[name], made[name]):
            return f"changes {name}"
    if not ((made["labels"] == given["labels"]) | (made["labels"] == IGNORED)).all():
        return f"gives labels that are neither those it got nor {IGNORED}"
    return ""
