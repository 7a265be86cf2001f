"""The `raydist` command. Each command imports what it needs when it is called, so that help is quick.

    jobs       init, validate, plan, prepare, train, submit, tune
    runs       ls, status, logs, show, stop, resume, verify, export
    llm        llm: AutoTrain's parameters; import: config files of other trainers
    clusters   doctor, cluster
    show       what the commands print; summary: a run's folder in one dictionary
    options    what several commands take

`main` turns a RaydistError into its message and its exit code.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from raydist.cli import clusters, jobs, llm, runs
from raydist.cluster.ray_output import stderr_set_aside
from raydist.errors import RaydistError
from raydist.files import storage_watched
from raydist.redact import redact


class InOrder(click.Group):
    """Lists its commands as they stand below: in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="raydist")
def group() -> None:
    """Raw files in, a trained Hugging Face model out, on a Ray cluster, from one job file.

    \b
    Begin with:  raydist init pretrain.yaml
                 raydist plan pretrain.yaml
                 raydist submit pretrain.yaml
    """


for command in (
    *(jobs.init, jobs.validate, jobs.plan, jobs.prepare, jobs.train, jobs.submit, jobs.tune),
    *(
        runs.ls,
        runs.status,
        runs.logs,
        runs.show_step,
        runs.stop,
        runs.resume,
        runs.verify,
        runs.export,
        runs.download,
    ),
    *(llm.llm, llm.import_, clusters.doctor, clusters.cluster),
):
    group.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a RaydistError becomes its message and its exit code."""
    try:
        with stderr_set_aside(), storage_watched(Path.cwd()):
            group.main(args=arguments, prog_name="raydist")
    except RaydistError as error:
        click.secho(f"raydist: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001 - a traceback may quote a URI too
        click.echo(redact(traceback.format_exc()), err=True, nl=False)
        sys.exit(1)
