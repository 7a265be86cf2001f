"""The `raydist` command. Each subcommand's module is imported when it is called, so that help is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from raydist.errors import RaydistError

COMMANDS = {
    "init": "raydist.cli.init",
    "validate": "raydist.cli.validate",
    "plan": "raydist.cli.plan",
    "prepare": "raydist.cli.prepare",
    "train": "raydist.cli.train",
    "submit": "raydist.cli.submit",
    "stop": "raydist.cli.stop",
    "export": "raydist.cli.export",
}
"""In the order in which a newcomer meets them."""

HELP = {
    "init": "Write a commented job file.",
    "validate": "Check job files without starting anything.",
    "plan": "Print what a job would do: data, steps, memory, disk.",
    "prepare": "Only make a job's token logs.",
    "train": "Run a job on this process's Ray.",
    "submit": "Run a job on a cluster, or here where none is configured.",
    "stop": "Ask a run for a checkpoint and a clean end.",
    "export": "Write a run's model in another form.",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(HELP.items()))


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="raydist")
def group() -> None:
    """Raw files in, a trained Hugging Face model out, on a Ray cluster, from one job file.

    \b
    Begin with:  raydist init pretrain.yaml
                 raydist plan pretrain.yaml
                 raydist submit pretrain.yaml
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a RaydistError becomes its message and its exit code."""
    try:
        group.main(args=arguments, prog_name="raydist", standalone_mode=True)
    except RaydistError as error:
        click.secho(f"raydist: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
