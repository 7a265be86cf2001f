"""`raydist submit`."""

from __future__ import annotations

import click

from raydist.cli.options import address, as_json, job_file, overrides


@click.command("submit")
@job_file
@overrides
@address
@as_json
def command(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Run the job on a cluster through Ray's Jobs API, follow its log and return its exit status.

    With no cluster configured the job runs here, on an embedded local Ray.
    """
    from raydist.cli.train import run_here
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
        run_here(job, None, as_json)
        return
    from raydist.cluster.submit import submit_and_follow

    raise SystemExit(submit_and_follow(job, cluster, click.echo))
