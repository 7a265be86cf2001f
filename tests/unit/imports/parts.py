"""Write a config of another trainer into an empty working folder, and import it as a user does."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from raydist.cli import group
from raydist.job.load import load_job
from raydist.job.schema import Job


def imported(text: str, name: str = "config.yml") -> tuple[Job, dict[str, str]]:
    """The job that the written file loads as, and its comments: `key: value` -> why."""
    Path(name).write_text(text)
    done = CliRunner().invoke(group, ["import", name, "-o", "job.yaml", "--force"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line for line in Path("job.yaml").read_text().splitlines() if line.startswith("#")]
    return load_job("job.yaml"), dict(line.removeprefix("# ").split(" - ", 1) for line in lines[1:])
