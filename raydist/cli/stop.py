"""`raydist stop`."""

from __future__ import annotations

import click

from raydist.cli.options import run_argument, storage


@click.command("stop")
@run_argument
@storage
def command(run: str, storage: str) -> None:
    """Ask RUN (a folder or a name) for a checkpoint and a clean end."""
    from raydist.errors import RunError
    from raydist.folder import find_run

    folder = find_run(run, storage)
    state = folder.status().get("state", "unknown")
    if state not in ("planning", "preparing", "training"):
        raise RunError(f"run {folder.path.name} is not running: it is {state}", where=str(folder.path))
    folder.stop_flag.touch()
    click.echo(f"asked {folder.path} to stop; it ends at its next step, after a checkpoint")
