"""What several commands take: a job, a run, overrides, an address."""

from __future__ import annotations

from collections.abc import Callable

import click

Command = Callable[..., None]
JOB = click.Path(dir_okay=False)

overrides = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key of the job, such as train.lr=1e-4.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
plain = click.option("--plain", is_flag=True, help="Print lines in a terminal too, in place of a live view.")
address = click.option(
    "--address", help="Ray's address. Default: RAY_ADDRESS, else cluster.address in the job."
)


def of_a_job(command: Command) -> Command:
    return click.argument("job_file", metavar="JOB.yaml", type=JOB)(overrides(command))


storage = click.option(
    "--storage", default="runs", show_default=True, help="Where runs are looked up by name."
)
at_cluster = click.option(
    "--address",
    metavar="URL",
    help="Ask the cluster at this dashboard address instead, where --storage is not to be seen from here.",
)


def of_a_run(command: Command) -> Command:
    return click.argument("run", metavar="RUN")(storage(command))
