"""`raydist plan`."""

from __future__ import annotations

from typing import Any

import click

from raydist.cli.options import as_json, echo_json, job_file, overrides


@click.command("plan")
@job_file
@overrides
@as_json
def command(job_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print what the job would do, from a sample of its files. Starts and writes nothing."""
    from raydist.estimate import plan_job
    from raydist.job.load import load_job

    planned = plan_job(load_job(job_file, overrides))
    if as_json:
        echo_json(planned)
    else:
        _print(planned)
        click.echo(f"next: raydist submit {job_file}")


def _print(planned: dict[str, Any]) -> None:
    click.echo(f"job {planned['name']}")
    for name, source in planned["data"]["sources"].items():
        click.echo(
            f"  {name}: {source['files']:,} files, {_bytes(source['file_bytes'])},"
            f" {source['slices']:,} slices;"
            f" about {source['documents']:,} documents, {source['tokens']:,} tokens; log {source['log']}"
        )
    steps = planned["steps"]
    click.echo(f"  tokenizer {planned['data']['tokenizer']}; about {planned['data']['blocks']:,} blocks")
    click.echo(
        f"  {steps['optimizer_steps']:,} steps of {steps['tokens_per_step']:,} tokens"
        f" on {steps['workers']} workers:"
        f" {steps['accumulation_steps']} micro batches of {steps['micro_batch_size']} sequences each"
    )
    parameters = planned["parameters"]
    click.echo(f"  {parameters['total']:,} parameters, {parameters['trainable']:,} of them trained")
    click.echo(f"  memory per worker: {_parts(planned['memory_per_worker_bytes'])}")
    click.echo(f"  disk: {_parts(planned['disk_bytes'])}")


def _parts(parts: dict[str, int]) -> str:
    inner = ", ".join(f"{name.replace('_', ' ')} {_bytes(n)}" for name, n in parts.items() if name != "total")
    return f"{_bytes(parts['total'])} ({inner})"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.3g} TiB"
