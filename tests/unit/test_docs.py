"""What the documents say is what the program takes: commands, job files, the table of keys, Python."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
import yaml

from raydist.cli import group
from raydist.job.load import build_job

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.split("#")[0].strip() for _, text in BLOCKS for line in text.splitlines()]
COMMANDS = sorted({c for c in LINES + re.findall(r"`(raydist [^`]+)`", README) if c.startswith("raydist ")})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    context = click.Context(group)
    found = group.get_command(context, name)
    assert found is not None, f"no command {name}"
    found.make_context(name, arguments, parent=context)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 8


def test_the_readmes_job_is_valid_and_short() -> None:
    text, optimizer, extension, curriculum, sweep = [text for language, text in BLOCKS if language == "yaml"]
    assert build_job(yaml.safe_load(text)).scaling.num_workers == 8
    assert len(text.splitlines()) <= 12
    train = {**yaml.safe_load(text)["train"], **yaml.safe_load(optimizer)["train"]}
    assert build_job({**yaml.safe_load(text), "train": train}).train.optimizer.name == "muon"
    given = yaml.safe_load(extension)
    train = {**yaml.safe_load(text)["train"], **given["train"]}
    assert build_job({**yaml.safe_load(text), **given, "train": train}).train.extend[0].rewarm
    staged = build_job({**yaml.safe_load(text), **yaml.safe_load(curriculum)})
    assert staged.block_sizes == [512, 2048] and staged.corpus.dedup == "exact"
    tune = build_job(yaml.safe_load(text + sweep)).tune
    assert tune is not None and tune.n_trials == 16


def test_the_readmes_python_compiles_and_names_what_exists() -> None:
    import raydist

    texts = [text for language, text in BLOCKS if language == "python"]
    for text in texts:
        compile(text, "README.md", "exec")
    named = re.findall(r"raydist\.(\w+)\(", "".join(texts))
    assert len(named) > 3 and all(callable(getattr(raydist, name)) for name in named)


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize(
    ("page", "maker"),
    [("job.md", "text"), ("support.md", "support_text"), ("autotrain.md", "autotrain_text")],
)
def test_the_generated_pages_are_fresh(page: str, maker: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))[maker]()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made, "run `make docs`"
