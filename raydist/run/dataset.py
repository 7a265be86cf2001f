"""The data side of a run: its tokenizer and its token logs, made where they are missing.

A run is pinned to the token logs it began with: when its source files change later, a message says so, and
the run keeps its tokens.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist.background import in_background
from raydist.corpus.build import LogPlan, build_log, plan_log
from raydist.corpus.log import TokenLog, open_log
from raydist.corpus.log_folder import MADE_AGAIN, LogFolder
from raydist.corpus.tokenizer import (
    TokenizerSpec,
    check_trained,
    document_start,
    planned_tokenizer,
    pretrained_tokenizer,
    resolve_tokenizer,
)
from raydist.errors import CorpusError, EmptyCorpus, LogError
from raydist.job.plan import Mix
from raydist.job.schema import Job, Source
from raydist.job.segments import Segment, mixes, segments_of
from raydist.storage import Storage
from raydist.track.listener import Listener

if TYPE_CHECKING:
    from raydist.corpus.pipeline import Share
    from raydist.feed.feed import Feed


@dataclass(frozen=True)
class Prepared:
    """All that training needs of the data: token logs to train on, and `eval_logs` only to evaluate on.

    bos: the id that each document begins with; None for none.  segments: of a run that was extended.
    """

    job: Job
    tokenizer: TokenizerSpec
    logs: dict[str, TokenLog]
    eval_logs: dict[str, TokenLog]
    bos: int | None
    segments: tuple[Segment, ...] = ()

    @property
    def complete(self) -> bool:
        return all(log.complete for log in self.logs.values())

    def pins(self) -> dict[str, Any]:
        """What a resumed run opens again, instead of planning its token logs from the source files."""
        return {
            "tokenizer": self.tokenizer.to_json(),
            "logs": {name: log.fingerprint for name, log in self.logs.items()},
            "eval_logs": {name: log.fingerprint for name, log in self.eval_logs.items()},
            "bos": self.bos,
            **({"segments": [each.to_json() for each in self.segments]} if self.segments else {}),
        }

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """Where the sources or weights of the run changed; see Feed."""
        return mixes(self.segments)

    def feed(self, listener: Listener | None = None) -> Feed:
        """The packed blocks; `listener` hears of packing, which the first feed of a packing takes.

        Raises EmptyCorpus when holdout and cleaning leave no document.
        """
        from raydist.feed import make_feed

        listener, packed = listener or Listener(), 0
        shards = sum(len(log.shards) for log in self.logs.values()) * len(self.job.block_sizes)

        def on_packed() -> None:
            nonlocal packed
            packed += 1
            listener.progress("packing", packed, shards)

        feed = make_feed(self.job, self.logs, on_packed, bos=self.bos, mixes=self.mixes)
        if empty := [source.name for source in feed.sources if source.n_blocks == 0]:
            raise EmptyCorpus(
                f"no document is left to train on in {', '.join(empty)}",
                why=f"a holdout of {self.job.corpus.holdout:g} and the cleaning left none",
                fix="lower corpus.holdout, loosen corpus.clean, or add text",
            )
        return feed


def prepare_logs(
    job: Job,
    listener: Listener,
    *,
    pinned: dict[str, Any] | None = None,
    stop: Callable[[], None] = lambda: None,
    verify: bool = False,
) -> Prepared:
    """The tokenizer and every token log of `job`, made where missing. Needs a Ray to run on.

    verify: read the shards that exist, and make those again whose bytes are not what was written.
    pinned: what `Prepared.pins` returned when the run began.  stop: called between token logs; raises to
    end the work.
    """

    def made(name: str, plan: LogPlan) -> TokenLog:
        stop()
        return _make(name, plan, job.corpus.on_error, listener, verify)

    if pinned and _complete(job, pinned):
        prepared = _open_pinned(job, pinned, made)
        _say_what_changed(prepared, listener)
        return prepared
    listener.phase("planning")
    return _of_plans(job, _tokenizer(job, pinned), made, pinned)


def can_begin_early(job: Job) -> bool:
    """Whether the order of samples is known before the token logs are complete.

    It is not known for epochs and for merged sources; duplicates and stages need complete token logs.
    """
    if job.stages or job.corpus.dedup != "none":
        return False
    weighted = all(weight is not None for weight in job.corpus.weights.values())
    known = weighted or len(job.corpus.sources) == 1
    return job.prepare.wait == "auto" and job.train.epochs is None and known


class Rest:
    """The rest of the token logs, made in a thread while training goes on with their beginning."""

    def __init__(self, make: Callable[[], Prepared]) -> None:
        self._make = make
        self.making = in_background(make, "preparation")

    @property
    def done(self) -> bool:
        """Also if it failed."""
        return self.making.done()

    @property
    def failed(self) -> bool:
        return self.done and self.making.exception() is not None

    def result(self) -> Prepared:
        """Waits for it, and raises what it raised."""
        return self.making.result()

    def go_on(self) -> Rest:
        """Begins again if it failed; slices that were made stay."""
        if self.failed:
            self.making = in_background(self._make, "preparation")
        return self


def prepare_first(
    job: Job, listener: Listener, share: Share, *, pinned: dict[str, Any] | None = None
) -> tuple[Prepared, Callable[[], Prepared]] | None:
    """The token logs up to their first window, and what makes the rest; None where there is no rest.

    The rest is made a window of each source at a time, so that training never waits for one source alone.
    """
    if pinned and _complete(job, pinned):
        return None
    window, tokenizer = job.packing.window_shards, _tokenizer(job, pinned)
    bos = document_begin(job, tokenizer, pinned)
    plans, eval_plans = _plans(job, tokenizer, pinned)
    if all(plan.complete or plan.n_slices <= window for plan in plans.values()):
        return None

    def made(plan: LogPlan, slices: int) -> TokenLog:
        stop = None if plan.complete or slices >= plan.n_slices else slices
        return build_log(plan, on_error=job.corpus.on_error, stop=stop, share=share)

    def up_to(slices: int) -> Prepared:
        logs = {name: made(plan, slices) for name, plan in plans.items()}
        return Prepared(job, tokenizer, logs, eval_logs, bos)

    def rest() -> Prepared:
        longest = max(plan.n_slices for plan in plans.values())
        for slices in range(2 * window, longest, window):
            up_to(slices)
        return up_to(longest)

    listener.phase("preparing", f"the first {window} slices of each source; the others while it trains")
    eval_logs = {name: made(plan, sys.maxsize) for name, plan in eval_plans.items()}
    for slices in itertools.count(window, window):  # a slice may hold no document, and so have no shard
        prepared = up_to(slices)
        if all(log.complete or len(log.shards) >= window for log in prepared.logs.values()):
            return prepared, rest
    raise AssertionError("unreachable: the last slice makes a log complete")


def find_prepared(job: Job, pinned: dict[str, Any] | None = None) -> Prepared:
    """The token logs of `job` as they are in its storage; makes nothing and needs no Ray.

    Raises LogError where one is not complete. pinned: a run's pins, which win over the source files.
    """

    def found(name: str, plan: LogPlan) -> TokenLog:
        return _opened(plan.path, plan.fingerprint)

    if pinned:
        return _open_pinned(job, pinned, found)
    tokenizer = planned_tokenizer(job, _storage(job))
    if tokenizer is None:
        raise LogError(
            "the job's tokenizer is not trained yet", fix="raydist prepare makes it and the token logs"
        )
    return _of_plans(job, tokenizer, found)


def _storage(job: Job) -> Storage:
    return Storage(job.storage).resolve()


def _plan(source: Source, job: Job, tokenizer: TokenizerSpec) -> LogPlan:
    return plan_log(source, job.corpus, tokenizer, _storage(job).tokens)


def _tokenizer(job: Job, pinned: dict[str, Any] | None) -> TokenizerSpec:
    return _pinned_encoder(pinned) if pinned else resolve_tokenizer(job, _storage(job))


def _pinned_tokenizer(pins: dict[str, Any]) -> TokenizerSpec:
    """Raises ModelError where it was trained here and is damaged."""
    tokenizer = TokenizerSpec.from_json(pins["tokenizer"])
    check_trained(Path(tokenizer.folder))
    return tokenizer


def _pinned_encoder(pins: dict[str, Any]) -> TokenizerSpec:
    """The same with its content, which making token logs takes. Raises LogError where it has changed."""
    pinned = _pinned_tokenizer(pins)
    found = pretrained_tokenizer(str(pinned.folder))
    if found.fingerprint != pinned.fingerprint:
        raise LogError(
            "the tokenizer is not the one that the run began with",
            where=str(pinned.folder),
            why="the same id would mean different text in the token logs that are still to be made",
            fix="restore it, or give the job a new name",
        )
    return replace(pinned, json=found.json)


def document_begin(job: Job, tokenizer: TokenizerSpec, pinned: dict[str, Any] | None) -> int | None:
    """The id that each document begins with; None for none. Raises JobError where the tokenizer lacks it.

    A run goes on as it began: `auto` is what its pins say. One that began without the key has no BOS.
    """
    if pinned and not isinstance(job.packing.add_bos_token, bool):
        bos: int | None = pinned.get("bos")
        return bos
    known = not pinned or "bos" in pinned  # else these pins do not say what the tokenizer has
    return document_start(job, tokenizer if known else pretrained_tokenizer(str(tokenizer.folder)))


def _plans(
    job: Job, tokenizer: TokenizerSpec, pinned: dict[str, Any] | None
) -> tuple[dict[str, LogPlan], dict[str, LogPlan]]:
    """For the sources to train on, and for those to evaluate on. pinned: fingerprints that they must have."""

    def plan(kind: str, name: str, source: Source) -> LogPlan:
        planned = _plan(source, job, tokenizer)
        if pinned and planned.fingerprint != pinned[kind].get(name, planned.fingerprint):
            raise LogError(
                f"{name}: its source files changed before its token log was complete",
                where=str(_storage(job).tokens / pinned[kind][name]),
                why="the run began with tokens of the files as they were",
                fix="restore the files, or give the job a new name",
            )
        return planned

    return (
        {name: plan("logs", name, source) for name, source in job.corpus.sources.items()},
        {name: plan("eval_logs", name, source) for name, source in job.eval.sources.items()},
    )


def _of_plans(
    job: Job,
    tokenizer: TokenizerSpec,
    log_of: Callable[[str, LogPlan], TokenLog],
    pinned: dict[str, Any] | None = None,
) -> Prepared:
    logs, eval_logs = (
        {name: log_of(name, plan) for name, plan in plans.items()} for plans in _plans(job, tokenizer, pinned)
    )
    segments = segments_of(pinned or {}, job)
    return Prepared(job, tokenizer, logs, eval_logs, document_begin(job, tokenizer, pinned), segments)


def _complete(job: Job, pins: dict[str, Any]) -> bool:
    """Whether all pinned token logs are complete, or gone altogether, which `_open_pinned` refuses."""
    tokens = _storage(job).tokens
    folders = [LogFolder(tokens / pin) for kind in ("logs", "eval_logs") for pin in pins[kind].values()]
    return not any(folder.begun() and not folder.complete() for folder in folders)


def _make(name: str, plan: LogPlan, on_error: str, listener: Listener, verify: bool) -> TokenLog:
    listener.phase(f"preparing {name}", f"{plan.n_files:,} files, {plan.n_slices:,} slices")
    log = build_log(
        plan,
        on_error=on_error,
        verify=verify,
        on_progress=lambda now: listener.prepare(now.n_done, now.n_slices, now.n_documents, now.n_tokens),
    )
    if log.n_quarantined:
        listener.message(
            f"{name}: {log.n_quarantined} unreadable records or files left out;"
            f" see {log.folder.quarantine_file}"
        )
    return log


def _say_what_changed(prepared: Prepared, listener: Listener) -> None:
    job, logs = prepared.job, prepared.eval_logs | prepared.logs
    for name, source in [*job.corpus.sources.items(), *job.eval.sources.items()]:
        try:
            if _plan(source, job, prepared.tokenizer).fingerprint == logs[name].fingerprint:
                continue
            reason = "its source files changed since the run began"
        except CorpusError as error:
            reason = f"its source files cannot be read any more ({error.what})"
        listener.message(f"{name}: {reason}; the run goes on with the tokens it began with")


def _open_pinned(job: Job, pins: dict[str, Any], log_of: Callable[[str, LogPlan], TokenLog]) -> Prepared:
    """log_of: gives the token log of a source that joins the run now."""
    tokenizer = _pinned_tokenizer(pins)

    def opened(kind: str, sources: Mapping[str, Source]) -> dict[str, TokenLog]:
        logs = {name: _open(job, pin) for name, pin in pins[kind].items()}
        if new := {name: source for name, source in sources.items() if name not in logs}:
            encoder = _pinned_encoder(pins)
            logs |= {name: log_of(name, _plan(source, job, encoder)) for name, source in new.items()}
        return logs

    logs, eval_logs = opened("logs", job.corpus.sources), opened("eval_logs", job.eval.sources)
    bos = document_begin(job, tokenizer, pins)
    return Prepared(job, tokenizer, logs, eval_logs, bos, segments_of(pins, job))


def _open(job: Job, fingerprint: str) -> TokenLog:
    try:
        return _opened(_storage(job).tokens / fingerprint, fingerprint)
    except LogError as error:
        raise LogError(
            f"the token log {fingerprint} that this run is pinned to cannot be opened",
            where=error.where,
            why=error.what + (f": {error.why}" if error.why else ""),
            fix="restore it (raydist prepare makes the same bytes of the same files), or take a new name",
        ) from error


def _opened(path: Path, fingerprint: str) -> TokenLog:
    log = open_log(path)
    if log.fingerprint != fingerprint:
        raise LogError(
            f"the token log in this folder is another one: {log.fingerprint}", where=str(path), fix=MADE_AGAIN
        )
    return log
