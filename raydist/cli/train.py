"""`raydist train`, and the summary that ends a run here or on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from raydist.cli.options import address, as_json, echo_json, job_file, overrides

if TYPE_CHECKING:
    from raydist.job.schema import Job
    from raydist.run import RunResult


@click.command("train")
@job_file
@overrides
@address
@as_json
def command(job_file: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Run the job on this process's Ray: RAY_ADDRESS, or an embedded one."""
    from raydist.cluster.connect import ray_address
    from raydist.job.load import load_job

    job = load_job(job_file, overrides)
    run_here(job, ray_address(address), as_json)


def run_here(job: Job, address: str | None, as_json: bool) -> None:
    from raydist.run import run_job

    result = run_job(job, address=address)
    if as_json:
        echo_json({"run": str(result.folder), "state": result.state, "evaluations": result.metrics})
    else:
        print_summary(result)


def print_summary(result: RunResult) -> None:
    """Perplexity before and after, where every token went, a sample, and where things are."""
    from raydist.folder import RunFolder
    from raydist.track.records import effective

    folder = RunFolder(result.folder)
    data = folder.data()
    click.echo()
    for name, last in result.metrics.items():
        first = next(r for r in effective(folder.path) if r["kind"] == "eval" and r["source"] == name)
        click.echo(
            f"held-out perplexity  {name}: {first['perplexity']:,.2f} -> {last['perplexity']:,.2f}"
            f"  ({first['bits_per_byte']:.3f} -> {last['bits_per_byte']:.3f} bits per byte)"
        )
    if audit := data.get("audit"):
        click.echo(
            f"tokens in {audit['n_in']:,} = trained {audit['n_trained']:,}"
            f" + held out {audit['n_held_out']:,} + left {audit['n_left']:,}"
        )
        if audit["n_repeated"]:
            click.echo(f"  beside these, {audit['n_repeated']:,} tokens were trained again in later epochs")
    if sample := data.get("sample"):
        click.echo(f"prompt        {sample['prompt']!r}\ncontinuation  {sample['continuation']!r}")
    click.echo(f"model   {folder.model}\nreport  {folder.report}")
