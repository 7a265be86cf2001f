"""`torchrun --nproc-per-node 8 -m raydist.training JOB.yaml`: train a prepared job without Ray."""

from __future__ import annotations

import os
import sys

if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - pathlib is not imported yet
    del sys.path[0]  # -m put the working folder first: a torch.py there would run in place of torch

from pathlib import Path

import click

from raydist.errors import RaydistError


@click.command()
@click.argument("job_file", metavar="JOB.yaml", type=click.Path(dir_okay=False))
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the job.")
@click.option(
    "--profile",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a trace of a few steps there, a file per rank.",
)
def main(job_file: str, overrides: tuple[str, ...], profile: Path | None) -> None:
    """Train JOB, whose token logs `raydist prepare` has made, on the ranks that torchrun started.

    Without torchrun it trains in this process alone. The run is the same as under Ray: the same folder,
    checkpoints and data order, so that either may resume the other's.
    """
    from raydist.job.load import load_job
    from raydist.run.torchrun import train_prepared

    try:
        train_prepared(load_job(job_file, overrides), profile=profile and profile.absolute())
    except RaydistError as error:
        if os.environ.get("RANK", "0") == "0":
            click.secho(f"raydist: {error}", fg="red", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(prog_name="python -m raydist.training")
