"""`raydist export`."""

from __future__ import annotations

import click

from raydist.cli.options import run_argument, storage


@click.command("export")
@run_argument
@storage
@click.option("--merge", is_flag=True, required=True, help="Merge the run's adapter into its base.")
def command(run: str, storage: str, merge: bool) -> None:
    """Write RUN's adapter merged into its base, as a model that needs no peft."""
    from raydist.folder import find_run
    from raydist.training.model import merge_adapter

    click.echo(f"merged model in {merge_adapter(find_run(run, storage).path)}")
