"""Commands that take a cluster: its file, or its address."""

from __future__ import annotations

import click

from raydist.cli import show
from raydist.cli.options import JOB, address, as_json, overrides
from raydist.errors import ClusterError

file = click.argument("path", metavar="FILE", type=click.Path(dir_okay=False))


@click.group(short_help="Check cluster files; start and stop clusters.")
def cluster() -> None:
    """Check cluster files; start and stop clusters by Ray's launcher, or by kubectl for a RayJob."""


@cluster.command(short_help="Check cluster files without starting anything.")
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, type=click.Path(dir_okay=False))
def validate(paths: tuple[str, ...]) -> None:
    """Check cluster files without starting anything. Every problem of a file is reported at once."""
    from raydist.cluster.launch import load_cluster

    show.checked(paths, load_cluster)


@cluster.command(short_help="Start a cluster.")
@file
def up(path: str) -> None:
    """Start the cluster of FILE behind a token, or bring it up to date with FILE."""
    from raydist.cluster import launch

    launch.up(path)


@cluster.command(short_help="End a cluster; its storage stays.")
@file
def down(path: str) -> None:
    """End the cluster of FILE; its storage stays."""
    from raydist.cluster import launch

    launch.down(path)


@cluster.command(short_help="Print a cluster's nodes.")
@file
def status(path: str) -> None:
    """Print the nodes of the cluster of FILE and their resources."""
    from raydist.cluster import launch

    launch.status(path)


@click.command(short_help="Check a cluster, for a job if one is given.")
@click.argument("job_file", metavar="[JOB.yaml]", required=False, type=JOB)
@overrides
@address
@as_json
def doctor(job_file: str | None, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Check every node of a cluster, for a job if one is given. Reports every problem at once."""
    from dataclasses import asdict

    from raydist.cluster.connect import ray_address
    from raydist.cluster.doctor import examine
    from raydist.cluster.submit import with_absolute_paths
    from raydist.job.load import load_job

    job = load_job(job_file, overrides) if job_file else None
    cluster = ray_address(address, job.cluster.address if job else None)
    if cluster is None:
        raise ClusterError(
            "no cluster to check", fix="give --address, set RAY_ADDRESS, or write cluster.address in the job"
        )
    findings = examine(cluster, with_absolute_paths(job, cluster) if job else None)
    if as_json:
        show.as_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.secho(str(finding), fg=None if finding.ok else "red")
    if not all(finding.ok for finding in findings):
        raise SystemExit(ClusterError.exit_code)
