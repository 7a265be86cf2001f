"""The house rules: what is light stays light, names have one owner, shipped jobs are valid and explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raydist.job.load import load_job

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
MODULES = sorted((ROOT / "raydist").rglob("*.py"))

MAX_TOP_LEVEL = 15

SMALL = {
    "sweep": ["model.config.hidden_size=64", "train.max_tokens=2048"],
    "quickstart": ["model.config.hidden_size=64", "model.config.intermediate_size=128", "train.max_steps=2"],
    "pretrain": ["model.config.hidden_size=64", "packing.block_size=128", "train.mixed_precision=fp32"],
    "fsdp": ["strategy.name=ddp", "packing.block_size=256", "scaling.num_workers=2"],
    "zero3": ["strategy.stage=2", "packing.block_size=256", "scaling.num_workers=2"],
    "continue": ["corpus.sources={text: {path: a.txt}}", "packing.block_size=256", "train.lr=1e-4"],
    "qlora": ["corpus.sources={text: {path: a.txt}}", "packing.block_size=256", "quantization=int8"],
}
"""For each job, overrides of the kind that make it small enough for a laptop."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def in_checkout() -> list[str]:
    """Every file that git would carry, committed or not."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


# --- jobs


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_is_valid_as_it_is_and_made_small(job: Path) -> None:
    loaded = load_job(job)
    overrides = SMALL[job.stem]
    if any("max_steps" in override for override in overrides):
        overrides = [*overrides, "train.max_tokens=null"]
    assert load_job(job, overrides) != loaded
    assert loaded.name == job.stem


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_job_is_explained(job: Path) -> None:
    """A comment stands on the key's line or on the line above."""
    text = job.read_text()
    lines = text.splitlines()
    bare = {
        n
        for n in key_lines(yaml.compose(text))
        if "#" not in lines[n] and not lines[n - 1].lstrip().startswith("#")
    }
    assert not bare, [lines[n] for n in sorted(bare)]


def key_lines(node: yaml.Node) -> Iterator[int]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key.start_mark.line
            yield from key_lines(value)


@pytest.mark.parametrize("name", ["pretrain", "continue", "fsdp", "zero3", "qlora"])
def test_the_full_jobs_show_every_key_of_the_schema(name: str) -> None:
    """Set, or behind a comment sign: `raydist init` writes these files."""
    documented = set(re.findall(r"^\| `([a-z_.A-Z]+)`", (ROOT / "docs" / "job.md").read_text(), re.MULTILINE))
    keys = {
        key.rpartition(".")[2]
        for key in documented
        if "eval.sources" not in key and not key.startswith(("adapter.", "tune."))
    }
    shown = set(re.findall(r"([a-z_]+): ", (ROOT / "jobs" / f"{name}.yaml").read_text()))
    assert len(keys) > 40 and not keys - shown


# --- the command line


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    """So that `raydist --help` answers at once."""
    code = "import raydist.cli, sys; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "ray", "transformers", "pydantic", "numpy", "pyarrow", "yaml"} & set(
        loaded.stdout.split()
    )


# --- the code


OWNERS = {
    "corpus/log_folder.py": ("manifest.json", "plan.json", "quarantine.jsonl", "slices/", "shards/"),
    "storage.py": (".packs", "mlflow.db"),
    "folder.py": (
        "raydist-job.yaml", "status.json", "data.json", "metrics.jsonl", "ledger.jsonl", "report.html",
        "trials.jsonl", "best.yaml", "sweep.html", "mlflow.json", "wandb.json", ".lease", "export/merged",
        "COMMIT.json",
    ),
}  # fmt: skip
"""The one module that spells each name; every other one asks it."""


@pytest.mark.parametrize("owner", OWNERS)
def test_names_in_a_folder_stand_in_one_module(owner: str) -> None:
    found = [
        f"{name_of(path)}:{node.lineno}: {node.value}"
        for path in MODULES
        if path != ROOT / "raydist" / owner
        for node in literals(ast.parse(path.read_text()))
        if " " not in node.value  # else it is a text for people
        and any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\.j2)", node.value) for name in OWNERS[owner])
    ]
    assert not found


def literals(module: ast.Module) -> Iterator[ast.Constant]:
    """Strings of a module that are no docstrings."""
    prose = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node


def test_who_imports_whom() -> None:
    """The contracts stand in pyproject.toml."""
    checked = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_every_package_of_raydist_is_named_in_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = set(re.findall(r"raydist\.(\w+)", " ".join(contracts[0]["layers"])))
    there = {path.stem for path in (ROOT / "raydist").glob("[a-z]*") if path.suffix == ".py" or path.is_dir()}
    assert there == named


# --- the checkout


def test_the_top_level_is_small() -> None:
    entries = {path.split("/")[0] for path in in_checkout()}
    assert len({entry for entry in entries if not entry.startswith(".")}) <= MAX_TOP_LEVEL, sorted(entries)


def test_no_file_names_a_folder_of_one_machine() -> None:
    """Paths under somebody's home, or a fixed temporary folder, work on one machine only."""
    machine = re.compile(r"/(?:home|Users|root|work)/[a-z0-9_.-]+")
    told = []
    for path in in_checkout():
        text = (ROOT / path).read_bytes().decode("utf-8", "replace") if (ROOT / path).is_file() else ""
        told += [f"{path}: {found.group()}" for found in machine.finditer(text)]
    assert not told


def test_the_lock_pins_everything_with_a_hash_but_torch() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.findall(r"^([a-z0-9-]+)==([^ \n]+)(.*?)(?=^[a-z#]|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 100 and all("--hash=sha256:" in rest for *_, rest in blocks)
    assert re.search(r"^# torch==\d+\.\d+\.\d+ ", text, re.MULTILINE)
    assert not {"torch", "triton"} & {name for name, *_ in blocks} and "://" not in text


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in asked} - {"torch"}  # type: ignore[index]
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert not names - pinned
