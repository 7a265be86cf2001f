"""What the model saw in one step of a run, as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raydist.errors import RunError
from raydist.feed.loader import global_batches
from raydist.feed.packing import IGNORED
from raydist.feed.trace import Piece, pieces
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.model.build import load_tokenizer
from raydist.run.dataset import find_prepared
from raydist.run.lifecycle import began_with
from raydist.track.records import effective
from raydist.training.checkpoint import commits
from raydist.training.collate import make_collator


@dataclass(frozen=True)
class Seen:
    """A piece of a sample.  text: of its inputs.  n_labels: how many of them predict the next token."""

    piece: Piece
    text: str
    n_labels: int

    def to_json(self) -> dict[str, Any]:
        return {**self.piece.to_json(), "text": self.text, "n_labels": self.n_labels}


@dataclass(frozen=True)
class Sample:
    """number: in the run.  n_padding: inputs behind the last piece.

    bad: that its step was skipped or found bad, and why; empty for any other.
    """

    number: int
    pieces: list[Seen]
    n_padding: int
    bad: str = ""

    def to_json(self) -> dict[str, Any]:
        seen = [each.to_json() for each in self.pieces]
        return {"sample": self.number, "pieces": seen, "n_padding": self.n_padding, "bad": self.bad}


def samples_of_step(folder: RunFolder, step: int) -> Iterator[Sample]:
    """The samples of the run's step, counted from 1, with the labels that `train.collator` left.

    Raises RunError for a step that the run does not have, LogError where a token log is gone or damaged.
    """
    job = began_with(folder)
    prepared = find_prepared(job, folder.data().get("pins"))
    feed = prepared.feed()
    plan = make_plan(job, 1, feed.samples_per_epoch)
    if not 1 <= step <= plan.steps:
        raise RunError(f"there is no step {step}", where=str(folder.path), why=f"the run has {plan.steps}")
    starts, sizes = [stage.start for stage in feed.stages], feed.for_each_stage(plan.batch_sizes)
    batches = global_batches(starts, 0, plan.samples, sizes)
    _, first, end = next(batch for number, batch in enumerate(batches, 1) if number == step)
    bad = _bad(folder, step, first, end)
    tokenizer, collate = load_tokenizer(prepared.tokenizer.folder), make_collator(job.train.collator)
    for g in range(first, end):
        batch = {name: torch.from_numpy(array) for name, array in feed.batch([g]).items()}
        batch = batch if collate is None else collate(batch)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        seen, filled = [], 0
        for piece in pieces(feed, g):
            filled = piece.first + piece.length
            inputs = slice(piece.first, filled)
            text = str(tokenizer.decode(ids[inputs].tolist()))
            seen.append(Seen(piece, text, int((labels[inputs] != IGNORED).sum())))
        yield Sample(g, seen, len(ids) - filled, bad)


def _bad(folder: RunFolder, step: int, first: int, end: int) -> str:
    """By the newest checkpoint, and by the records of the steps since then."""
    records = [record for record in effective(folder) if record["kind"] == "skip"]
    own = next((record for record in records if record["step"] == step), None)
    back = [
        r for r in records if r.get("back_to") is not None and r["skipped_from"] <= first < r["end_sample"]
    ]
    newest = next(commits(folder), None)
    if own is not None:
        became = "trained, though bad" if own["action"] == "recorded" else "skipped"
        return f"step {step} was {became}: {own['reason']}"
    if back:
        when, to = back[0]["step"], back[0]["back_to"]
        return f"step {step} was skipped: at step {when} the run went back to step {to}"
    return f"step {step} was skipped" if newest is not None and newest.skipped.holds(first, end) else ""
