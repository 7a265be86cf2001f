"""Commands that take a run: a folder or a name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raydist import errors
from raydist.cli import jobs, show
from raydist.cli.options import address as of_job
from raydist.cli.options import as_json, at_cluster, of_a_run, storage
from raydist.track import humanize

if TYPE_CHECKING:
    from raydist.folder import RunFolder

POLL_SECONDS, REMOTE_POLL_SECONDS = 0.5, 3.0


@click.command(short_help="List runs: state, step, last loss.")
@storage
@at_cluster
@as_json
def ls(storage: str, address: str | None, as_json: bool) -> None:
    """List the runs in a storage folder, or the jobs of a cluster; the newest first."""
    from raydist.cli.summary import summary
    from raydist.cluster import remote
    from raydist.folder import runs_in

    if address is not None:
        rows = [remote.job_summary(job) for job in remote.jobs_of(remote.connect(address))]
    else:
        rows = [summary(folder) for folder in runs_in(storage)]
        rows.sort(key=lambda row: str(row["since"]), reverse=True)
    if as_json:
        show.as_json(rows)
    elif rows:
        show.runs(rows)
    else:
        click.echo(f"no runs in {address or storage}", err=True)


@click.command(short_help="Say how a run stands.")
@of_a_run
@at_cluster
@as_json
def status(run: str, storage: str, address: str | None, as_json: bool) -> None:
    """Say how RUN stands: state, step, loss, perplexity, checkpoints, and where things are."""
    from raydist.cli.summary import summary
    from raydist.cluster import remote
    from raydist.folder import find_run

    if address is not None:
        known = remote.job_summary(remote.find_job(remote.connect(address), run))
    else:
        known = summary(find_run(run, storage))
    if as_json:
        show.as_json(known)
    else:
        show.run(known)


@click.command(short_help="Print what a run has done, or does.")
@of_a_run
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@at_cluster
def logs(run: str, storage: str, follow: bool, address: str | None) -> None:
    """Print RUN's records as lines. The exit status is that of the run, once it has ended."""
    from raydist.folder import find_run

    if address is not None:
        raise SystemExit(_logs_of_job(run, address, follow))
    folder = find_run(run, storage)
    _print_records(folder, follow)
    _end_as(folder)


def _end_as(folder: RunFolder) -> None:
    from raydist.folder import DAMAGED

    state, known = folder.state(), folder.status()
    name = folder.path.resolve().name
    if state == "failed":
        click.secho(f"run {name} failed: {known.get('error')}", fg="red", err=True)
        raise SystemExit(getattr(errors, str(known.get("kind")), errors.RaydistError).exit_code)
    if state == "interrupted":
        raise errors.RunError(f"run {name} was interrupted", why="its driver is dead", fix="raydist resume")
    if state == DAMAGED:
        raise errors.RunError(f"how run {name} ended is not known", why=known["error"], fix="raydist resume")
    if state == "stopped":
        raise SystemExit(errors.Stopped.exit_code)


def _print_records(folder: RunFolder, follow: bool) -> None:
    from raydist.folder import LIVE
    from raydist.track.progress import Lines
    from raydist.track.records import Tail

    lines, tail = Lines(click.echo), Tail(folder.metrics_file)
    while True:
        live = follow and folder.refresh().state() in LIVE  # before the poll: the last records are not missed
        for record in tail.poll():
            lines.record(record)
        if not live:
            return
        time.sleep(REMOTE_POLL_SECONDS if folder.remote else POLL_SECONDS)


def _logs_of_job(run: str, address: str, follow: bool) -> int:
    from raydist.cluster import remote

    client = remote.connect(address)
    submission = remote.find_job(client, run).submission_id or ""
    if follow:
        return remote.follow_job(client, submission, click.echo)
    click.echo(client.get_job_logs(submission), nl=False)
    return remote.exit_status(client.get_job_info(submission))


@click.command(name="show", short_help="Print the text that the model saw in a step.")
@of_a_run
@click.option("--step", type=click.IntRange(min=1), required=True, help="The step, counted from 1.")
@as_json
def show_step(run: str, storage: str, step: int, as_json: bool) -> None:
    """Print what the model saw in a step of RUN: each document's file, place and text, as it was packed."""
    from raydist.folder import find_run
    from raydist.run.step_text import samples_of_step

    samples = samples_of_step(find_run(run, storage), step)
    if as_json:
        show.as_json([sample.to_json() for sample in samples])
    else:
        for sample in samples:
            show.sample(sample)


@click.command(short_help="Ask a run for a checkpoint and a clean end.")
@of_a_run
@at_cluster
def stop(run: str, storage: str, address: str | None) -> None:
    """Ask RUN (a folder or a name) for a checkpoint and a clean end."""
    from raydist.folder import LIVE, find_run

    if address is not None:
        _stop_job(run, address)
        return
    folder = find_run(run, storage)
    if (state := folder.state()) not in LIVE:
        raise errors.RunError(f"run {folder.path.name} is not running: it is {state}", where=str(folder.path))
    folder.ask_to_stop()
    click.echo(f"asked {folder.path} to stop; it ends at its next step, after a checkpoint")


def _stop_job(run: str, address: str) -> None:
    from raydist.cluster import remote

    client = remote.connect(address)
    job = remote.find_job(client, run)
    if job.status.is_terminal():
        raise errors.RunError(f"run {run} is not running: its job is {job.status.name}", where=address)
    client.stop_job(job.submission_id or "")
    click.echo(f"asked {job.submission_id} to stop; it ends at its next step, after a checkpoint")


@click.command(short_help="Submit a run's job again: it goes on.")
@of_a_run
@of_job
@as_json
@click.pass_context
def resume(context: click.Context, run: str, storage: str, address: str | None, as_json: bool) -> None:
    """Submit RUN's own job again: it goes on from its last checkpoint."""
    from raydist.folder import find_run
    from raydist.run.lifecycle import began_with

    folder = find_run(run, storage)
    command = jobs.submit if began_with(folder).tune is None else jobs.tune
    context.invoke(command, job_file=str(folder.job_file), overrides=(), address=address, as_json=as_json)


@click.command(short_help="Compare a run's or a token log's files with their checksums.")
@click.argument("run", metavar="RUN|LOG")
@storage
@as_json
def verify(run: str, storage: str, as_json: bool) -> None:
    """Read RUN (a folder or a name), its checkpoints and its token logs; or the token log in the folder LOG.

    Compares all files with their checksums, and changes nothing. Says what is damaged and what to do; the
    exit status is not 0 then.
    """
    from raydist.corpus.log_folder import LogFolder
    from raydist.folder import find_run
    from raydist.run.verify import verify_log, verify_run
    from raydist.storage import Storage

    def say(text: str) -> None:
        click.echo(f"reading {text}", err=True)

    log = LogFolder(Storage(run).path)
    found = (
        verify_log(log.path, say)
        if log.begun() or log.complete()
        else verify_run(find_run(run, storage), say)
    )
    if as_json:
        show.as_json(found.to_json())
    else:
        show.verified(found)
    if found.damage:
        raise SystemExit(found.damage[0].exit_code)


@click.command(short_help="Copy a run's model, report and records out of a bucket.")
@of_a_run
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--checkpoints", is_flag=True, help="Its checkpoints too.")
def download(run: str, storage: str, folder: Path, checkpoints: bool) -> None:
    """Copy RUN's model, report and records into FOLDER, which must be new or empty."""
    from raydist.folder import find_run

    found = find_run(run, storage)
    n_files, n_bytes = found.download(folder, checkpoints=checkpoints)
    click.echo(f"{n_files} files, {humanize.size(n_bytes)} in {folder}")


@click.command(short_help="Write a run's model in another form.")
@of_a_run
@click.option("--merge", is_flag=True, required=True, help="Merge the run's adapter into its base.")
@click.option(
    "--base",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A copy of the base, where it has moved; not for a quantized run.",
)
def export(run: str, storage: str, merge: bool, base: Path | None) -> None:
    """Write RUN's adapter merged into its base, as a model that needs no peft."""
    from raydist.folder import find_run
    from raydist.model.export import merge_adapter

    click.echo(f"merged model in {merge_adapter(find_run(run, storage), base)}")
