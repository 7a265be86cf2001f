"""raydist from Python: the same jobs, and the same samples for programs with a loop of their own."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist.cluster.connect import ray_address, ray_session, start_ray
from raydist.corpus.log import open_log
from raydist.errors import RunError
from raydist.files import storage_watched
from raydist.folder import find_run
from raydist.job.load import load_job
from raydist.job.schema import Job
from raydist.run.dataset import Prepared, find_prepared, prepare_logs
from raydist.run.lifecycle import began_with, folder_of
from raydist.run.run import RunResult, run_job
from raydist.storage import Storage
from raydist.track.listener import Listener
from raydist.track.progress import make_view

if TYPE_CHECKING:
    import ray.data

    from raydist.feed.feed import Feed
    from raydist.sweep.sweep import SweepResult

__all__ = ["blocks", "load_job", "open_feed", "open_log", "prepare", "submit", "train", "tune"]

BLOCKS_PER_TASK = 256


def train(job: Job, *, address: str | None = None) -> RunResult:
    """Run `job` here, on this process's Ray, on the cluster at `address`, or on an embedded one.

    Resumes the run of the same name. Raises a RaydistError; the run's folder then says failed or stopped.
    """
    return run_job(job, address=ray_address(address))


def submit(job: Job, *, address: str | None = None) -> int:
    """Submit `job` through Ray's Jobs API, follow its log and return its exit status.

    Without an address, RAY_ADDRESS or cluster.address it runs here: 0, or an error is raised.
    """
    cluster = ray_address(address, job.cluster.address)
    if cluster is None:
        run_job(job)
        return 0
    from raydist.cluster.submit import submit_and_follow

    return submit_and_follow(job, cluster, print)


def tune(job: Job, *, address: str | None = None) -> SweepResult:
    """Run the sweep of `job`, or go on with the one of that name; its trials, best first.

    Raises TrainingError if trials failed; the sweep's folder has the others.
    """
    from raydist.sweep.sweep import run_sweep

    return run_sweep(job, address=ray_address(address))


def prepare(job: Job, *, address: str | None = None, listener: Listener | None = None) -> Prepared:
    """Make the token logs of `job`, or find them made; returns them opened.

    Reads what exists, and makes again what is damaged. listener: by default a live view, or lines, on stderr.
    """
    view, address = listener or make_view(name=job.name), ray_address(address)
    # an extension has the tokenizer of its run, which may have been trained on the corpus of that time
    pinned = folder_of(job).refresh().data().get("pins") if job.train.extend else None
    with storage_watched(Storage(job.storage).path), view:
        view.phase("joining the cluster" if address else "starting Ray")
        with ray_session(0, 1, address) as session:
            made = partial(prepare_logs, job, view, pinned=pinned, verify=True)
            return session.do_again(made, "preparation", job.scaling.max_failures, view.message)


def open_feed(job_or_run: Job | str | Path) -> Feed:
    """The packed blocks of a job whose logs are prepared, or of a run: `.block(g)`, `.loader(...)`.

    Yields exactly the samples that the trainer reads: input_ids, labels, position_ids (int64, shape
    (block_size,)), sample, and document_lengths (int32, (block_size,)): how long each document of the block
    is, from left to right, with padding as the last of them and zeros behind. Raises RunError where the
    logs are not made yet.
    """
    return _prepared(job_or_run).feed()


def blocks(job_or_run: Job | str | Path, start: int = 0, stop: int | None = None) -> ray.data.Dataset:
    """Packed blocks `start` to `stop` of the run's order as a Ray Dataset; rows stand in that order.

    Columns: input_ids, labels, position_ids (int64, shape (block_size,)) and sample. labels are
    already shifted: the next token of the same document, else -100. stop: default one epoch; a
    weighted mixture has no end and needs it. Read on this process's Ray, on RAY_ADDRESS, or on an
    embedded one, which then stays until the process ends.
    """
    prepared = _prepared(job_or_run)
    feed = prepared.feed()
    stop = feed.samples_per_epoch if stop is None else stop
    if stop is None:
        raise RunError(
            "a weighted mixture, or stages, have no end", fix="say how many blocks: blocks(job, start, stop)"
        )
    if start < stop and feed.stage_number(start) != feed.stage_number(stop - 1):
        raise RunError(
            f"blocks {start} to {stop} are of several stages",
            why="a stage has one block size and one mixture, and a Dataset's columns have one shape",
            fix=f"ask for one stage at a time; they begin at {[s.start for s in feed.stages]}",
        )
    tasks = max(1, -(-(stop - start) // BLOCKS_PER_TASK))

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        made = _feed_of(prepared).batch(batch["id"] + start)
        del made["document_lengths"]  # position_ids say the same to other programs
        return made

    start_ray(ray_address(None))
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else a dozen lines for each read
    return ray.data.range(stop - start, override_num_blocks=tasks).map_batches(
        read, batch_size=BLOCKS_PER_TASK
    )


_FEEDS: dict[str, Feed] = {}
"""This process's feeds: a Ray Data task finds the one that the task before it opened."""


def _feed_of(prepared: Prepared) -> Feed:
    key = repr(prepared.pins()) + prepared.job.model_dump_json()
    if key not in _FEEDS:
        _FEEDS[key] = prepared.feed()
    return _FEEDS[key]


def _prepared(job_or_run: Job | str | Path) -> Prepared:
    """The logs of a run are those it is pinned to; a job's are looked up, never made here."""
    if isinstance(job_or_run, Job):
        folder, job = folder_of(job_or_run), job_or_run
    else:
        folder = find_run(job_or_run)
        job = began_with(folder)
    return find_prepared(job, folder.data().get("pins"))
