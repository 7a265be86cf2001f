"""`raydist validate`."""

from __future__ import annotations

import click

from raydist.cli.options import overrides


@click.command("validate")
@click.argument("job_files", metavar="JOB.yaml...", nargs=-1, required=True, type=click.Path(dir_okay=False))
@overrides
def command(job_files: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Check job files without starting anything. Every problem of a file is told at once."""
    from raydist.errors import JobError
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
