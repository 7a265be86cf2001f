"""A job's own functions are found in the working folder, and nothing else there is ever imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydist.errors import JobError
from raydist.job import functions
from raydist.job.functions import find_in, import_function, module_folders

ROOT = Path(__file__).resolve().parents[3]
WHERE = "train.hooks[0]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, in which a job's module, a package and a module that no job names lie."""
    (tmp_path / "its_hooks.py").write_text("def f(): return 'f'\n")
    (tmp_path / "its_package").mkdir()
    (tmp_path / "its_package" / "__init__.py").touch()
    (tmp_path / "its_package" / "inner.py").write_text("from its_package import __name__ as g\n")
    (tmp_path / "bystander.py").write_text("raise SystemExit('imported')")
    (tmp_path / "its_other.py").write_text("import bystander")
    (tmp_path / "textwrap.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(functions, "_NAMED", functions._NamedModules())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("its_", "bystander")):
            del sys.modules[name]


def test_a_module_of_the_working_folder_is_found_by_its_name_in_the_job_alone(place: Path) -> None:
    path = list(sys.path)
    assert import_function("its_hooks:f", WHERE)() == "f"
    assert import_function("its_package.inner:g", WHERE) == "its_package"
    assert import_function("textwrap:dedent", WHERE)(" a") == "a"  # what is installed comes first
    with pytest.raises(ModuleNotFoundError):
        import bystander  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(JobError, match="its_other:f") as refused:
        import_function("its_other:f", WHERE)
    assert "bystander" in refused.value.why and "PYTHONPATH" in refused.value.fix
    assert sys.path == path


def test_a_worker_finds_the_drivers_modules_from_another_folder(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["its_hooks:f", "its_package.inner:g", "no_such:f", "sys:exit"]
    folders = module_folders(named)
    assert folders == {"its_hooks": str(place), "its_package": str(place)}
    monkeypatch.setattr(functions, "_NAMED", functions._NamedModules())  # as in another process
    monkeypatch.chdir(tmp_path_factory.mktemp("worker"))
    with pytest.raises(JobError):
        import_function("its_hooks:f", WHERE)
    find_in(folders)
    assert import_function("its_hooks:f", WHERE)() == "f"


@pytest.mark.parametrize("command", ["raydist", "raydist.training"])
def test_the_commands_import_nothing_of_the_working_folder(tmp_path: Path, command: str) -> None:
    for name in ("click", "torch", "inspect"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the working folder ran')")
    result = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "") and "Usage" in result.stdout
