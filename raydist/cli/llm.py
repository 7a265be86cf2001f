"""Commands for those who come from other trainers: AutoTrain's `llm`, and the import of config files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from raydist.autotrain.table import ALIASES, TABLE, Parameter
from raydist.cli import show
from raydist.errors import JobError


class _AsInAutoTrain(click.Command):
    """Takes --batch_size for --batch-size; unknown options are refused later, with a reason each."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_dashed(word) for word in args])


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _option(name: str, parameter: Parameter) -> Callable[[Any], Any]:
    names = [name, *(alias for alias, parameter in ALIASES.items() if parameter == name)]
    flags = ["--" + n.replace("_", "-") for n in names]
    default = f"  [default: {parameter.default}]" if str(parameter.default) not in ("None", "False") else ""
    choices = [str(value) for value in parameter.values or () if value is not None]
    known = f" One of: {', '.join(choices)}." if choices else ""
    meaning = parameter.meaning[0].upper() + parameter.meaning[1:]
    more: dict[str, Any] = {"help": f"{meaning}.{known}{default}"}
    if parameter.kinds == (bool,):
        flags[0] += "/--no-" + flags[0].removeprefix("--")
    elif name == "resume_from_checkpoint":
        more |= {"is_flag": False, "flag_value": "true", "metavar": "[true|false|PATH]"}
    else:
        kind = parameter.kinds[0]
        more |= {"type": kind, "multiple": name == "data_path", "metavar": kind.__name__.upper()}
    return click.option(*flags, name, default=None, **more)


def _with_options(command: Any) -> Any:
    for name, parameter in reversed(TABLE.items()):
        command = _option(name, parameter)(command)
    return command


@click.command(
    cls=_AsInAutoTrain,
    context_settings={"ignore_unknown_options": True},
    short_help="Train by AutoTrain's parameters.",
)
@_with_options
@click.option("--train", is_flag=True, help="As in AutoTrain; may be left out.")
@click.option("--print-job", is_flag=True, help="Print the job file and run nothing.")
@click.option("--address", help="Ray's address. Default: RAY_ADDRESS, else an embedded Ray.")
@click.argument("others", nargs=-1, type=click.UNPROCESSED, metavar="")
def llm(train: bool, print_job: bool, address: str | None, others: tuple[str, ...], **given: Any) -> None:
    """Train by the parameters of AutoTrain's default trainer; PROJECT-NAME gets the model at the end.

    The same command again resumes a run that was stopped. Parameters without a meaning here are refused.
    """
    if address is not None and "://" in address:
        raise JobError(
            f"{address} takes jobs, not parameters",
            fix=f"raydist llm ... --print-job > job.yaml; raydist submit job.yaml --address {address}",
        )
    from raydist.autotrain.params import LLMTrainingParams

    asked = {name: value for name, value in given.items() if value not in (None, ())}
    config = LLMTrainingParams.unchecked({**asked, **_named(others)})
    if print_job:
        import yaml

        click.echo(yaml.safe_dump(config.job_values(), sort_keys=False, allow_unicode=True), nl=False)
        return
    from raydist.autotrain.project import run

    show.result(run(config, address=address))
    click.echo(f"project {config.project_name}")


def _named(words: tuple[str, ...]) -> dict[str, str]:
    """Unknown options and their values; each is refused later, with its reason."""
    unknown: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith("--"):
            unknown[name.removeprefix("--").replace("-", "_")] = value
        elif not unknown:
            raise click.UsageError(f"unexpected argument {word}")
    return unknown


@click.command(
    "import", short_help="Turn a config file of AutoTrain, axolotl or LLaMA-Factory into a job file."
)
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "output", metavar="JOB.yaml", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace JOB.yaml if it exists.")
def import_(path: Path, output: Path | None, force: bool) -> None:
    """Turn a config file of AutoTrain, axolotl or LLaMA-Factory into a job file.

    Whose it is shows in its keys. Only training on raw text is taken: AutoTrain's default trainer, axolotl's
    data sets of type completion and pretraining_dataset, LLaMA-Factory's stage pt. A comment explains each
    key without a counterpart. Run it where the trainer runs, since relative paths are looked up.
    """
    from raydist import files
    from raydist.imports.recognize import imported

    trainer, text = imported(path)
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists() and not force:
        raise JobError(f"{output} exists", fix="choose another name, or --force to replace it")
    files.write_text(output, text)
    click.echo(
        f"read {path} as a config of {trainer}, wrote {output}."
        f" Next:  raydist plan {output}  and  raydist submit {output}"
    )
