"""`raydist export`."""

from __future__ import annotations

from pathlib import Path

import click

from raydist.cli.options import run_argument, storage


@click.command("export")
@run_argument
@storage
@click.option("--merge", is_flag=True, required=True, help="Merge the run's adapter into its base.")
@click.option(
    "--base",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A copy of the base, where it has moved; not for a quantized run.",
)
def command(run: str, storage: str, merge: bool, base: Path | None) -> None:
    """Write RUN's adapter merged into its base, as a model that needs no peft."""
    from raydist.folder import find_run
    from raydist.training.trained import merge_adapter

    click.echo(f"merged model in {merge_adapter(find_run(run, storage).path, base)}")
