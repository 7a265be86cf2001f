"""`raydist prepare`."""

from __future__ import annotations

from typing import Any

import click

from raydist.cli.options import address, as_json, echo_json, job_file, overrides


@click.command("prepare")
@job_file
@overrides
@address
@as_json
def command(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Only make the job's token logs; what is there already is kept."""
    from raydist.api import prepare
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job
    from raydist.prepared import describe_log

    job = load_job(job_file, overrides)
    prepared = prepare(job, address=ray_address(address, job.cluster.address))
    described = prepared.describe(prepared.feed())
    described["eval_sources"] = {name: describe_log(log) for name, log in prepared.eval_logs.items()}
    if as_json:
        echo_json(described)
    else:
        _print(described)
        click.echo(f"next: raydist submit {job_file}")


def _print(described: dict[str, Any]) -> None:
    for name, source in (described["sources"] | described["eval_sources"]).items():
        click.echo(
            f"{name}: {source['n_documents']:,} documents, {source['n_tokens']:,} tokens,"
            f" {source['n_shards']:,} shards in {source['path']}"
        )
        if source["n_quarantined"]:
            click.echo(
                f"  {source['n_quarantined']:,} unreadable records or files:"
                f" {source['path']}/quarantine.jsonl"
            )
        if source["n_empty"]:
            click.echo(f"  {source['n_empty']:,} documents without text after cleaning, left out")
    packing = described["packing"]
    click.echo(
        f"packed ({packing['strategy']}): {packing['n_blocks']:,} blocks of {packing['block_size']:,} tokens,"
        f" {packing['padding_share']:.2%} padding"
    )
