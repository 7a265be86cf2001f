"""The `raydist` command. Each command imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raydist.cli import show
from raydist.errors import JobError, RaydistError, RunError

if TYPE_CHECKING:
    from raydist.job.schema import Job

Command = Callable[..., None]
JOB = click.Path(dir_okay=False)

overrides = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key of the job, such as train.lr=1e-4.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
address = click.option(
    "--address", help="Ray's address. Default: RAY_ADDRESS, else cluster.address in the job."
)


def of_a_job(command: Command) -> Command:
    return click.argument("job_file", metavar="JOB.yaml", type=JOB)(overrides(command))


def of_a_run(command: Command) -> Command:
    storage = click.option(
        "--storage", default="runs", show_default=True, help="Where RUN is looked up by name."
    )
    return click.argument("run", metavar="RUN")(storage(command))


class InOrder(click.Group):
    """Lists its commands as they stand below: in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="raydist")
def group() -> None:
    """Raw files in, a trained Hugging Face model out, on a Ray cluster, from one job file.

    \b
    Begin with:  raydist init pretrain.yaml
                 raydist plan pretrain.yaml
                 raydist submit pretrain.yaml
    """


@group.command(short_help="Write a commented job file.")
@click.argument("path", metavar="JOB.yaml", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["pretrain", "continue", "fsdp", "zero3", "qlora"]),
    default="continue",
    show_default=True,
    help="From random weights, or on from a pretrained model; the last three for one that does not fit.",
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
    click.echo(f"wrote {path}. Next: mend its paths, then  raydist plan {path}  and  raydist submit {path}")


@group.command(short_help="Check job files without starting anything.")
@click.argument("job_files", metavar="JOB.yaml...", nargs=-1, required=True, type=JOB)
@overrides
def validate(job_files: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check job files without starting anything. Every problem of a file is told at once."""
    from raydist.job.load import load_job

    failed = False
    for path in job_files:
        try:
            load_job(path, overrides)
        except JobError as error:
            failed = True
            click.secho(f"{path}: {error}", fg="red", err=True)
        else:
            click.echo(f"{path}: valid")
    if failed:
        raise SystemExit(JobError.exit_code)


@group.command(short_help="Print what a job would do: data, steps, memory, disk.")
@of_a_job
@as_json
def plan(job_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print what the job would do, from a sample of its files. Starts and writes nothing."""
    from raydist.estimate import plan_job
    from raydist.job.load import load_job

    planned = plan_job(load_job(job_file, overrides))
    if as_json:
        show.as_json(planned)
    else:
        show.planned(planned)
        click.echo(f"next: raydist submit {job_file}")


@group.command(short_help="Only make a job's token logs.")
@of_a_job
@address
@as_json
def prepare(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Only make the job's token logs; what is there already is kept."""
    from raydist import api
    from raydist.cluster.connect import ray_address
    from raydist.prepared import describe_log

    job = api.load_job(job_file, overrides)
    prepared = api.prepare(job, address=ray_address(address, job.cluster.address))
    described = prepared.describe(prepared.feed())
    described["eval_sources"] = {name: describe_log(log) for name, log in prepared.eval_logs.items()}
    if as_json:
        show.as_json(described)
    else:
        show.prepared(described)
        click.echo(f"next: raydist submit {job_file}")


@group.command(short_help="Run a job on this process's Ray.")
@of_a_job
@address
@as_json
def train(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Run the job on this process's Ray: RAY_ADDRESS, or an embedded one."""
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job

    _run_here(load_job(job_file, overrides), ray_address(address), as_json)


@group.command(short_help="Run a job on a cluster, or here where none is configured.")
@of_a_job
@address
@as_json
def submit(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
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
        _run_here(job, None, as_json)
        return
    from raydist.cluster.submit import submit_and_follow

    raise SystemExit(submit_and_follow(job, cluster, click.echo))


def _run_here(job: Job, address: str | None, as_json: bool) -> None:
    from raydist.run import run_job

    result = run_job(job, address=address)
    if as_json:
        show.as_json({"run": str(result.folder), "state": result.state, "evaluations": result.metrics})
    else:
        show.result(result)


@group.command(short_help="Ask a run for a checkpoint and a clean end.")
@of_a_run
def stop(run: str, storage: str) -> None:
    """Ask RUN (a folder or a name) for a checkpoint and a clean end."""
    from raydist.folder import find_run

    folder = find_run(run, storage)
    state = folder.status().get("state", "unknown")
    if state not in ("planning", "preparing", "training"):
        raise RunError(f"run {folder.path.name} is not running: it is {state}", where=str(folder.path))
    folder.stop_flag.touch()
    click.echo(f"asked {folder.path} to stop; it ends at its next step, after a checkpoint")


@group.command(short_help="Write a run's model in another form.")
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
    from raydist.training.trained import merge_adapter

    click.echo(f"merged model in {merge_adapter(find_run(run, storage).path, base)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a RaydistError becomes its message and its exit code."""
    try:
        group.main(args=arguments, prog_name="raydist")
    except RaydistError as error:
        click.secho(f"raydist: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
