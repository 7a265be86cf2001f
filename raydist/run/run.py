"""A job from raw files to a trained model: plan, prepare, train, and account for every token.

The composition root: it holds the run's folder, makes the token logs, has attempts made until one ends by
itself, and writes the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from raydist.cluster.resources import spare
from raydist.errors import JobError
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.run.dataset import Prepared, Rest, can_begin_early, prepare_first, prepare_logs
from raydist.run.lifecycle import Life, at_the_end, keep_collator, state_after
from raydist.track.listener import Listener
from raydist.track.progress import make_view
from raydist.track.records import EvalRecord, effective, read_metrics

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM

    from raydist.feed.feed import Feed
    from raydist.model.base import CausalModel


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `metrics`: the last evaluation of each source, by name."""

    folder: Path
    state: str
    metrics: dict[str, EvalRecord]

    @property
    def model_path(self) -> Path:
        return RunFolder(self.folder).model

    def load_model(self) -> CausalModel | PeftModelForCausalLM:
        """The trained model, from transformers or, with an adapter, from peft."""
        from raydist.model.export import load_trained

        RunFolder(self.folder).fetch_model()
        return load_trained(self.model_path)


def run_job(
    job: Job,
    *,
    address: str | None = None,
    listener: Listener | None = None,
    parent: str | None = None,
    profile: Path | None = None,
) -> RunResult:
    """Run `job` to its end, or resume the run of that name.

    listener: by default a live view, or lines, on stderr.  parent: the MLflow run that it is part of.
    profile: a folder for a trace of a few steps, which every worker must see.
    Raises a RaydistError; the run's status then says failed, or stopped after a checkpoint.
    """
    if job.tune is not None:
        raise JobError(f"{job.name} is a sweep: it has a tune section", fix="raydist tune, or tune: null")
    life = Life(job, "run", listener or make_view(name=job.name))
    with life.held():
        if life.finished:
            life.listener.message(f"run {job.name} is finished already; nothing to do")
            return _result(life.folder)
        with life.begun():
            from raydist.run.preflight import check_job

            check_job(job)
            keep_collator(job, life.folder)
            with life.on_ray(address):
                _prepare_and_train(life, parent, profile)
        return _result(life.folder)


def _prepare_and_train(life: Life, parent: str | None, profile: Path | None) -> None:
    from raydist.run import attempts
    from raydist.run.preflight import check_on_cluster
    from raydist.training.data import open_eval_sets

    life.prepare(lambda: check_on_cluster(life.job))
    life.preparing()
    prepared, rest = _prepare(life)
    life.listener.phase("packing")
    feed = prepared.feed(life.listener)
    write_data(life.folder, prepared, feed)
    if life.folder.remote and prepared.complete:
        # chosen here, while this node has all shards; the workers' nodes then fetch only what they read
        open_eval_sets(life.job, prepared.logs, prepared.eval_logs, prepared.bos)
    life.stop_if_asked()
    with reported(life, parent):
        result = attempts.train(life, prepared, feed.samples_per_epoch, rest, profile=profile)
        if rest is not None:
            if result.stopped and not rest.done:
                raise life.stopped()
            prepared = _awaited(rest, life)
            life.listener.phase("packing")
            feed = prepared.feed(life.listener)
            write_data(life.folder, prepared, feed)
        account(life, prepared, feed)
        if result.stopped:
            raise life.stopped()


# --- data ----------------------------------------------------------------------------------------


def _prepare(life: Life) -> tuple[Prepared, Rest | None]:
    """The token logs; or their first windows, and the rest, which is made while training goes on."""
    job, pinned = life.job, life.folder.data().get("pins")

    def begin() -> tuple[Prepared, Callable[[], Prepared] | None]:
        share = spare(job) if can_begin_early(job) else None
        first = prepare_first(job, life.listener, share, pinned=pinned) if share else None
        return first or (prepare_logs(job, life.listener, pinned=pinned, stop=life.stop_if_asked), None)

    prepared, make_rest = life.prepare(begin)
    return prepared, Rest(make_rest) if make_rest else None


def _awaited(rest: Rest, life: Life) -> Prepared:
    if not rest.done:
        life.listener.phase(
            "preparing", "training has ended; the rest of the token logs, to account for every token"
        )
    return life.prepare(lambda: rest.go_on().result())


def write_data(folder: RunFolder, prepared: Prepared, feed: Feed) -> None:
    from raydist.run.describe import describe

    folder.add_data(pins=prepared.pins(), **describe(prepared, feed) if prepared.complete else {})


# --- the end -------------------------------------------------------------------------------------


def account(life: Life, prepared: Prepared, feed: Feed) -> None:
    """What became of every token up to the newest checkpoint, and a sample of the model's text."""
    from raydist.feed.audit import audit
    from raydist.run.text_sample import text_sample
    from raydist.training.checkpoint import commits

    folder, sample = life.folder, None
    life.listener.phase("accounting for every token")
    newest = next(commits(folder), None)
    counted = audit(feed, newest.samples, newest.skipped.ranges) if newest else audit(feed, 0)
    if folder.model.exists():
        life.listener.phase("sampling", "a text of the trained model")
        sample = text_sample(prepared, folder)
    began = next(r for r in reversed(read_metrics(folder)) if r["kind"] in ("start", "resume"))
    parameters = {"total": began["n_parameters"], "trainable": began["n_trainable"]}
    folder.add_data(audit=counted.to_json(), sample=sample, parameters=parameters)


@contextmanager
def reported(life: Life, parent: str | None) -> Iterator[None]:
    """Trackers follow the run; they and the report say how it ended, however it ends."""
    from raydist.track.report import LiveReport, write_report
    from raydist.track.start import start_trackers
    from raydist.track.tracker import Tracker

    warn = life.listener.message
    report = LiveReport(life.folder)
    live = Tracker(lambda: report, "report", life.folder, warn)
    trackers = start_trackers(life.job, life.folder, parent=parent, on_warning=warn)

    def conclude(error: BaseException | None) -> None:
        state = state_after(error)
        life.listener.phase("writing the report")
        report.ended = True
        live.finish(state)
        try:
            write_report(life.folder, state=state, error=str(error) if state == "failed" else "")
        finally:
            for tracker in trackers:
                life.listener.phase("sending records", tracker.name)
                tracker.finish(state)

    with at_the_end(conclude, life.folder.path):
        yield


def _result(folder: RunFolder) -> RunResult:
    last = {r["source"]: cast(EvalRecord, r) for r in effective(folder) if r["kind"] == "eval"}
    return RunResult(folder.path, folder.status()["state"], last)
