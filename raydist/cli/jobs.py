"""Commands that take a job file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raydist.cli import show
from raydist.cli.options import JOB, address, as_json, of_a_job, overrides, plain
from raydist.errors import JobError, TrainingError

if TYPE_CHECKING:
    from raydist.job.schema import Job


@click.command(short_help="Write a commented job file.")
@click.argument("path", metavar="JOB.yaml", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["pretrain", "continue", "fsdp", "zero3", "qlora", "sweep"]),
    default="continue",
    show_default=True,
    help="From random weights, or on from a pretrained model; for one that does not fit; a sweep.",
)
@click.option("--force", is_flag=True, help="Replace JOB.yaml if it exists.")
def init(path: Path, kind: str, force: bool) -> None:
    """Write a job file in which every key is commented."""
    from importlib import resources

    from raydist import files

    if path.exists() and not force:
        raise JobError(f"{path} exists", fix="choose another name, or --force to replace it")
    template = resources.files("raydist.job") / "templates" / f"{kind}.yaml"
    files.write_text(path, template.read_text(encoding="utf-8"))
    run = "tune" if kind == "sweep" else "submit"
    click.echo(f"wrote {path}. Next: fix its paths, then  raydist plan {path}  and  raydist {run} {path}")


@click.command(short_help="Check job files without starting anything.")
@click.argument("job_files", metavar="JOB.yaml...", nargs=-1, required=True, type=JOB)
@overrides
def validate(job_files: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check job files without starting anything. Every problem of a file is reported at once."""
    from raydist.job.load import load_job

    show.checked(job_files, lambda path: load_job(path, overrides))


@click.command(short_help="Print what a job would do: data, steps, memory, disk.")
@of_a_job
@click.option(
    "--measure", is_flag=True, help="Make two steps of one worker here, for the time and memory of the run."
)
@plain
@as_json
def plan(job_file: str, overrides: tuple[str, ...], measure: bool, plain: bool, as_json: bool) -> None:
    """Print what the job or the sweep would do, from a sample of its files. Starts and writes nothing."""
    from raydist.job.load import load_job
    from raydist.track.progress import make_view

    job = load_job(job_file, overrides)
    if measure and job.tune is not None:
        raise JobError(f"{job.name} is a sweep, whose trials differ", fix="measure one with --set tune=null")
    with make_view(name=job.name, plain=plain) as view:  # before the imports, which take their time
        from raydist.run.estimate import plan_job, plan_sweep

        planned = plan_job(job, view, measured=measure) if job.tune is None else plan_sweep(job, view)
    if as_json:
        show.as_json(planned)
    elif job.tune is None:
        show.planned(planned)
    else:
        show.planned_sweep(planned)
    if not as_json:
        click.echo(f"next: {to_run(job, job_file, overrides)}")


def to_run(job: Job, job_file: str, overrides: tuple[str, ...]) -> str:
    """The command that runs the job as it was given here."""
    words = ["raydist", "submit" if job.tune is None else "tune", job_file]
    return shlex.join([*words, *(word for value in overrides for word in ("--set", value))])


@click.command(short_help="Only make a job's token logs.")
@of_a_job
@address
@plain
@as_json
def prepare(
    job_file: str, overrides: tuple[str, ...], address: str | None, plain: bool, as_json: bool
) -> None:
    """Only make the job's token logs; what is there already is kept."""
    from raydist import api
    from raydist.cluster.connect import ray_address
    from raydist.run.describe import describe, describe_log
    from raydist.track.progress import make_view

    job = api.load_job(job_file, overrides)
    with make_view(name=job.name, plain=plain) as view:
        prepared = api.prepare(job, address=ray_address(address, job.cluster.address), listener=view)
        described = describe(prepared, prepared.feed(view))
    described["eval_sources"] = {name: describe_log(log) for name, log in prepared.eval_logs.items()}
    if as_json:
        show.as_json(described)
    else:
        show.prepared(described)
        click.echo(f"next: {to_run(job, job_file, overrides)}")


@click.command(short_help="Run a job on this process's Ray.")
@of_a_job
@address
@click.option(
    "--profile",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a torch.profiler trace of a few steps there, a file per worker.",
)
@plain
@as_json
def train(
    job_file: str,
    overrides: tuple[str, ...],
    address: str | None,
    profile: Path | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Run the job on this process's Ray: RAY_ADDRESS, or an embedded one.

    Without Ray: torchrun --nproc-per-node N -m raydist.training JOB.yaml, once `raydist prepare` has made the
    token logs.
    """
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job

    job, profile = load_job(job_file, overrides), profile and profile.absolute()
    _run_here(job, ray_address(address), as_json, plain, profile)


@click.command(short_help="Run a job on a cluster, or here where none is configured.")
@of_a_job
@address
@plain
@as_json
def submit(
    job_file: str, overrides: tuple[str, ...], address: str | None, plain: bool, as_json: bool
) -> None:
    """Run the job on a cluster through Ray's Jobs API, follow its log and return its exit status.

    With no cluster configured the job runs here, on an embedded local Ray.
    """
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job

    job = load_job(job_file, overrides)
    cluster = ray_address(address, job.cluster.address)
    if cluster is None:
        click.echo(
            "no cluster configured (--address, RAY_ADDRESS or cluster.address):"
            " running on an embedded local Ray",
            err=True,
        )
        _run_here(job, None, as_json, plain)
        return
    from raydist.cluster.submit import submit_and_follow

    raise SystemExit(submit_and_follow(job, cluster, click.echo))


def _run_here(job: Job, address: str | None, as_json: bool, plain: bool, profile: Path | None = None) -> None:
    from raydist.track.progress import make_view

    with make_view(name=job.name, plain=plain) as view:  # before the imports, which take their time
        from raydist.run.run import run_job

        result = run_job(job, address=address, listener=view, profile=profile)
    if as_json:
        show.as_json({"run": str(result.folder), "state": result.state, "evaluations": result.metrics})
    else:
        show.result(result)


@click.command(short_help="Run a sweep over learning rate, block size or any other key.")
@of_a_job
@address
@plain
@as_json
def tune(job_file: str, overrides: tuple[str, ...], address: str | None, plain: bool, as_json: bool) -> None:
    """Run the sweep that the job's `tune` section describes, here or on a cluster; resumes it if it began."""
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job

    job = load_job(job_file, overrides)
    cluster = ray_address(address, job.cluster.address)
    if cluster is not None and "://" in cluster:
        from raydist.cluster.submit import submit_and_follow

        raise SystemExit(submit_and_follow(job, cluster, click.echo, "tune"))
    from raydist.run.lifecycle import folder_of
    from raydist.track.progress import make_view

    whole = True
    try:
        with make_view(name=job.name, plain=plain) as view:  # before the imports, which take their time
            from raydist.sweep.sweep import run_sweep

            run_sweep(job, address=cluster, listener=view)
    except TrainingError:  # trials failed; the others are compared
        raise
    except BaseException:
        whole = False
        raise
    finally:
        from raydist.sweep.sweep import read_sweep

        if folder_of(job).trials_file.exists():
            result = read_sweep(job)
            show.as_json(result) if as_json else show.sweep(result, whole=whole)
