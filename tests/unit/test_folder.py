"""One writer per run, freed by the kernel; files are whole or absent; torn records are no records."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydist import files
from raydist.errors import RunBusy, RunError
from raydist.folder import RunFolder, find_run
from raydist.job.schema import Job
from raydist.run.run import run_job
from raydist.sealed import append_sealed, read_sealed_lines
from raydist.sweep.sweep import run_sweep

HOLD = "import sys,time,pathlib\nfrom raydist.folder import RunFolder\n\
with RunFolder(pathlib.Path(sys.argv[1])).lease():\n print('held', flush=True)\n time.sleep(60)"


def test_a_lease_is_taken_over_when_its_process_is_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=f"process {holder.pid} on"), folder.lease():
            pass
        holder.kill()
        holder.wait()
    with folder.lease():
        assert folder.path.is_dir()


def test_attempts_count_over_the_life_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.next_attempt() == 1
    (folder.ray / "attempt-10").mkdir(parents=True)
    (folder.ray / "attempt-9").mkdir()
    assert folder.next_attempt() == 11


def test_a_run_is_found_by_folder_and_by_name(tmp_path: Path) -> None:
    RunFolder(tmp_path / "mine").mark("run")
    files.write_text(tmp_path / "project" / "job.yaml", "name: project\n")  # a user's, and no run
    assert find_run("mine", str(tmp_path)).path == find_run(tmp_path / "mine").path
    with pytest.raises(RunError, match=r"runs in .*: mine;"):
        find_run("yours", str(tmp_path))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(FileExistsError), files.replacing(path) as temporary:
        temporary.mkdir(exist_ok=not temporary.write_text("half"))
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_torn_last_line_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert files.read_jsonl(path) == []
    append_sealed(path, {"step": 1}, flush=True)
    with path.open("ab") as stream:
        stream.write(b'{"step": 2')
    assert read_sealed_lines(path) == [{"step": 1}]


@pytest.mark.parametrize("line", [b"\0\xff", b"[1]", b'{"step": 2'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"records\.jsonl is damaged") as refused:
        files.read_jsonl(path)
    assert refused.value.where == f"{path}, line 2" and refused.value.fix


def test_a_run_is_interrupted_when_its_driver_is_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lease():
        folder.set_status("training")
        assert folder.state() == "training" and folder.driver().startswith("process ")
    assert (folder.state(), folder.driver()) == ("interrupted", "")
    folder.set_status("finished")
    assert folder.state() == "finished"


# --- whose folder it is


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def marked(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.mark("run")
    return folder


@pytest.mark.parametrize("command", [run_job, run_sweep], ids=["run", "sweep"])
def test_a_users_project_folder_is_refused_and_left_as_it_is(
    tmp_path: Path, command: Callable[..., object]
) -> None:
    """Its name and the storage folder happen to be those of the job in it."""
    project = tmp_path / "exp1"
    files.write_text(project / "job.yaml", "# my comments\nname: exp1\n")
    files.write_text(project / "src" / "model.py", "print(1)\n")
    before = tree(project)
    tune = {"search": {"train.lr": {"grid": [1e-4]}}} if command is run_sweep else None
    job = a_job("exp1", tmp_path, tune=tune)
    for _ in range(2):
        with pytest.raises(RunError, match=r"holds what raydist did not write: job\.yaml, src") as refused:
            command(job)
        assert refused.value.exit_code == 6 and "another name or storage" in refused.value.fix
        assert tree(project) == before


def a_job(name: str, storage: Path, **more: Any) -> Job:
    model = {"config": {"model_type": "llama"}, "tokenizer": {"train": {"vocab_size": 300}}}
    corpus = {"sources": {"a": {"path": "a.txt"}}}
    values = {
        "name": name,
        "storage": str(storage),
        "model": model,
        "corpus": corpus,
        "train": {"max_tokens": 8},
    }
    return Job.model_validate(values | more)


def test_a_folder_that_is_missing_or_empty_becomes_a_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        folder = marked(tmp_path / name)
        assert folder.exists() and files.read_json(folder.marker)["kind"] == "run"
        folder.mark("run")  # again, as a resumed run does
        with pytest.raises(RunError, match="is the name of a run, and a sweep was asked for"):
            folder.check_place("sweep")


def test_clearing_removes_what_raydist_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = marked(tmp_path / "run")
    folder.write_job("name: run\n")
    folder.set_status("failed")
    for ours in ("checkpoints/step-00000001/a", "model/config.json", "ray/attempt-1/x"):
        files.write_text(folder.path / ours, "ours")
    users = {"notes.txt": b"mine", "job.yaml": b"# mine", "figures/loss.png": b"mine"}
    for name, content in users.items():
        files.write_bytes(folder.path / name, content)
    folder.clear()
    assert tree(folder.path) == {**users, ".raydist": folder.marker.read_bytes()}


def test_a_link_where_a_run_keeps_its_files_is_not_followed(tmp_path: Path) -> None:
    folder = marked(tmp_path / "run")
    folder.set_status("failed")
    files.write_text(tmp_path / "disk" / "precious", "mine")
    folder.checkpoints.symlink_to(tmp_path / "disk")
    before = tree(tmp_path)
    with pytest.raises(RunError, match="checkpoints in the run's folder is a link"):
        folder.clear()
    assert tree(tmp_path) == before and folder.checkpoints.is_symlink()


def test_a_run_from_before_there_was_a_marker_is_known_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "old")
    with folder.lease():
        files.write_text(folder.path / "job.yaml", "name: old\n")
        folder.set_status("stopped")
    assert folder.job_file.name == "job.yaml" and find_run("old", str(tmp_path)).path == folder.path
    folder.mark("run")
    folder.write_job("name: old\n")
    assert folder.job_file.name == "raydist-job.yaml" and not (folder.path / "job.yaml").exists()
    assert folder.state() == "stopped"


def test_a_run_from_before_there_was_a_marker_with_a_users_file_in_it_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "old")
    with folder.lease():
        files.write_text(folder.path / "job.yaml", "name: old\n")
        folder.set_status("stopped")
    files.write_text(folder.path / "notes.txt", "mine")
    with pytest.raises(RunError, match=r"did not write: job\.yaml, notes\.txt"):
        folder.mark("run")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x00\xff"])
def test_a_damaged_marker_is_no_permission(tmp_path: Path, content: bytes) -> None:
    folder = marked(tmp_path / "run")
    folder.marker.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=r"\.raydist is damaged"):
        folder.mark("run")
    assert tree(tmp_path) == before
