"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorated = Callable[..., Any]

job_file = click.argument("job_file", metavar="JOB.yaml", type=click.Path(dir_okay=False))
overrides = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key of the job, such as train.lr=1e-4.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
address = click.option(
    "--address", help="Ray's address. Default: RAY_ADDRESS, else cluster.address in the job."
)
run_argument = click.argument("run", metavar="RUN")
storage = click.option("--storage", default="runs", show_default=True, help="Where RUN is looked up by name.")


def echo_json(value: Any) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())
