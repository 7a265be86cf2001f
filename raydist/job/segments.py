"""The segments of an extended run: what its samples are drawn from in each, and which jobs may extend it.

    finished run + job with `train.extend` ─▶ refusals ─▶ extended ─▶ the run's pins ─▶ mixes ─▶ feed
                                                                              lengths: plan.make_plan

The job of an extended run has the sources and weights of its last segment; those of the segments before stand
in the run's pins. A segment does not change any more once a checkpoint lies behind its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydist.job.identity import differences
from raydist.job.plan import Mix, make_plan
from raydist.job.schema import Job


@dataclass(frozen=True)
class Segment:
    """From step `first_step` and sample `first_sample` on, counted from 0, for so many steps.

    weights: of each source as the job gives them.  shares: as they are used, None for all where the sources
    are read as one. Both in the order of the feed: a source keeps its place.
    rewarm, optimizer: of `train.extend`; of the first segment they say nothing.
    """

    first_step: int
    first_sample: int
    steps: int
    weights: dict[str, float | None]
    shares: dict[str, float | None]
    rewarm: bool = True
    optimizer: str = "keep"

    def to_json(self) -> dict[str, Any]:
        sources = [[name, weight, self.shares[name]] for name, weight in self.weights.items()]
        kept = {name: value for name, value in vars(self).items() if name not in ("weights", "shares")}
        return {**kept, "sources": sources}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Segment:
        values = dict(given)
        sources = values.pop("sources")
        weights, shares = ({source[0]: source[nth] for source in sources} for nth in (1, 2))
        return cls(**values, weights=weights, shares=shares)


def segments_of(pins: dict[str, Any], job: Job) -> tuple[Segment, ...]:
    """Those in a run's pins that its job knows of; () for a run that was never extended."""
    kept = pins.get("segments", []) if job.train.extend else []
    return tuple(Segment.from_json(each) for each in kept[: len(job.train.extend) + 1])


def begun(segments: Sequence[Segment], newest: int) -> tuple[Segment, ...]:
    """Those that the newest checkpoint, of that step, lies in or behind."""
    return tuple(each for each in segments if each.first_step < max(newest, 1))


def extended(job: Job, before: Sequence[Segment] = ()) -> tuple[Segment, ...]:
    """The segments of a job: those known before, and the others as the job is now."""
    known = list(before)
    names = [*known[-1].weights] if known else []
    names += [name for name in job.corpus.sources if name not in names]
    weights = {name: job.corpus.sources[name].weight for name in names}
    shares = {name: job.corpus.weights[name] for name in names}
    plan = make_plan(job, 1, None)
    for part, given in zip(plan.segments, [None, *job.train.extend], strict=True):
        if part.first_step >= sum(each.steps for each in before):
            optimizer = given.optimizer if given else "keep"
            first_sample = part.first_step * plan.global_batch_size
            known.append(
                Segment(part.first_step, first_sample, part.steps, weights, shares, part.rewarm, optimizer)
            )
    return tuple(known)


def mixes(segments: Sequence[Segment]) -> tuple[Mix, ...]:
    """Where sources or weights change; () where they never do."""
    found: list[Mix] = []
    for each in segments:
        if not found or each.shares != found[-1].weights:
            found.append(Mix(each.first_sample, each.shares))
    return tuple(found) if len(found) > 1 else ()


def job_at(job: Job, segments: Sequence[Segment]) -> Job:
    """The job as it was in the last of these segments, which are not all of those that it has now."""
    last = segments[-1]
    sources = {
        name: source.model_copy(update={"weight": last.weights[name]})
        for name, source in job.corpus.sources.items()
        if name in last.weights
    }
    return job.model_copy(
        update={
            "corpus": job.corpus.model_copy(update={"sources": sources}),
            "train": job.train.model_copy(update={"extend": job.train.extend[: len(segments) - 1]}),
        }
    )


def _without_new(was: Job, old: Job, new: Job) -> Job:
    """old: `new` with the sources and weights of `was`. `replay` may change where it gives no weights."""
    if all(source.weight is None for source in new.corpus.sources.values()):
        return old
    sources = {
        name: source.model_copy(update={"replay": was.corpus.sources[name].replay})
        for name, source in old.corpus.sources.items()
    }
    return old.model_copy(update={"corpus": old.corpus.model_copy(update={"sources": sources})})


def refusals(was: Job, new: Job, newest: int) -> list[str]:
    """Why a run of the job `was` cannot be extended to `new`, a line each; [] where it can.

    newest: the step of its newest checkpoint.
    """
    n = len(was.train.extend)
    if new.train.extend[:n] != was.train.extend or len(new.train.extend) == n:
        return differences(was, new)
    first = extended(was)[-1]
    if changed := differences(was, _without_new(was, job_at(new, [first] * (n + 1)), new)):
        return changed
    steps, before, after = make_plan(was, 1, None).steps, was.corpus.weights, new.corpus.weights
    found = []
    if newest < steps:
        found.append(f"train.extend: the run is at step {newest:,} of {steps:,}; let it end first")
    if before != after and None in after.values():
        found.append("corpus.sources: from an extension with other sources on, every source needs a weight")
    if before != after and None in before.values() and len(before) > 1:
        found.append(
            f"corpus.sources: the run reads {', '.join(before)} as one, without weights, so their weights"
            " cannot change, and no source can join them"
        )
    if was.corpus.dedup != "none" and after.keys() - before.keys():
        found.append(
            "corpus.sources: with dedup, a new source would change which documents of the others are left out"
        )
    return found
