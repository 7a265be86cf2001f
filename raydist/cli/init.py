"""`raydist init`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click


@click.command("init")
@click.argument("path", metavar="JOB.yaml", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["pretrain", "continue"]),
    default="continue",
    show_default=True,
    help="From random weights, or on from a pretrained model.",
)
@click.option("--force", is_flag=True, help="Replace JOB.yaml if it exists.")
def command(path: Path, kind: str, force: bool) -> None:
    """Write a job file in which every key is commented."""
    from raydist import files
    from raydist.errors import JobError

    if path.exists() and not force:
        raise JobError(f"{path} exists", fix="choose another name, or --force to replace it")
    template = resources.files("raydist.job") / "templates" / f"{kind}.yaml"
    files.write_text(path, template.read_text(encoding="utf-8"))
    click.echo(f"wrote {path}. Next: mend its paths, then  raydist plan {path}  and  raydist submit {path}")
