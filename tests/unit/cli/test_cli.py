"""The command line is light, names its commands, and turns errors into messages and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from raydist.cli import group
from raydist.cli.jobs import to_run
from raydist.job.load import build_job
from raydist.job.tune import Distribution, Tune

HEAVY = {"torch", "ray", "transformers", "pydantic", "pyarrow", "numpy", "mlflow", "yaml", "rich"}


def raydist(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_importing_the_cli_imports_nothing_heavy() -> None:
    code = "import sys, raydist.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert HEAVY.isdisjoint(loaded)


@pytest.mark.parametrize("name", group.commands)
def test_every_command_has_help(name: str) -> None:
    result = CliRunner().invoke(group, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert (group.commands[name].short_help or "").split()[0] in result.output


def test_help_names_the_choices_and_the_short_option() -> None:
    text = " ".join(CliRunner().invoke(group, ["llm", "--help"]).output.split())
    assert "One of: linear, cosine, constant, constant_with_warmup, wsd. [default: linear]" in text
    assert "-f, --follow" in CliRunner().invoke(group, ["logs", "--help"]).output


def test_the_next_command_runs_the_job_as_it_was_given() -> None:
    one = build_job(
        {
            "name": "a",
            "model": {"base": "b"},
            "corpus": {"sources": {"s": {"path": "p"}}},
            "train": {"max_steps": 1},
        }
    )
    sweep = one.model_copy(update={"tune": Tune(search={"train.lr": Distribution(choice=[1e-4])})})
    assert to_run(one, "my job.yaml", ("train.lr=1e-3",)) == (
        "raydist submit 'my job.yaml' --set train.lr=1e-3"
    )
    assert to_run(sweep, "job.yaml", ()) == "raydist tune job.yaml"


@pytest.mark.parametrize("kind", ["pretrain", "continue", "fsdp", "zero3", "qlora", "sweep"])
def test_init_writes_a_valid_job_and_replaces_nothing(tmp_path: Path, kind: str) -> None:
    made = raydist("init", "job.yaml", "--kind", kind, cwd=tmp_path)
    run = "tune" if kind == "sweep" else "submit"
    assert made.returncode == 0 and f"raydist {run} job.yaml" in made.stdout
    assert raydist("validate", "job.yaml", cwd=tmp_path).stdout == "job.yaml: valid\n"
    again = raydist("init", "job.yaml", cwd=tmp_path)
    assert again.returncode == 2 and "job.yaml exists" in again.stderr


def test_validate_tells_the_problems_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\n")
    result = raydist("validate", "a.yaml", "b.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "a.yaml: 3 problems in the job" in result.stderr and "no job file b.yaml" in result.stderr


def test_an_unknown_run_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    result = raydist("stop", "nothing", cwd=tmp_path)
    assert result.returncode == 6 and "no run nothing" in result.stderr and "Traceback" not in result.stderr
