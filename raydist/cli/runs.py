"""Commands that take a run: a folder or a name."""

from __future__ import annotations

from pathlib import Path

import click

from raydist.cli.options import of_a_run
from raydist.errors import RunError


@click.command(short_help="Ask a run for a checkpoint and a clean end.")
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


@click.command(short_help="Write a run's model in another form.")
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
