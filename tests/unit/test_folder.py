"""One writer per run, freed by the kernel; files are whole or absent; torn records are no records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raydist import files
from raydist.errors import RunBusy, RunError
from raydist.folder import RunFolder, find_run

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
    files.write_text(tmp_path / "mine" / "job.yaml", "name: mine\n")
    assert find_run("mine", str(tmp_path)).path == find_run(tmp_path / "mine").path
    with pytest.raises(RunError, match=r"runs in .*: mine"):
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
    files.append_json(path, {"step": 1}, flush=True)
    with path.open("ab") as stream:
        stream.write(b'{"step": 2')
    assert files.read_jsonl(path) == [{"step": 1}]


def test_a_run_is_interrupted_when_its_driver_is_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lease():
        folder.set_status("training")
        assert folder.state() == "training" and folder.driver().startswith("process ")
    assert (folder.state(), folder.driver()) == ("interrupted", "")
    folder.set_status("finished")
    assert folder.state() == "finished"
