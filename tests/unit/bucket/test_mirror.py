"""Two nodes with mirrors of one bucket: what one writes the other has, and the bucket decides."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raydist import files
from raydist.bucket import appended, lease, mirror
from raydist.bucket.lease import Lease
from raydist.bucket.objects import Exists
from raydist.errors import RunBusy, RunError
from raydist.folder import RunFolder, find_run, runs_in
from raydist.places import FOLDER, shown, uri_of, with_uris
from raydist.sealed import read_sealed_lines
from raydist.training import ledger
from raydist.training.checkpoint import Commit, Counts, commit, newest_valid, state_folder


def other_node(path: Path) -> Path:
    """The same place in the mirror of another node."""
    parts = path.parts
    at = parts.index(FOLDER)
    return Path(*parts[: at - 1], "other", *parts[at:])


def test_paths_and_uris(storage: Path) -> None:
    uri = uri_of(storage / "run" / "status.json")
    assert uri is not None and uri.startswith("s3://") and uri.endswith("/runs/run/status.json")
    assert mirror.place_of(uri) == storage / "run" / "status.json"
    assert uri_of(Path("/data/runs")) is None and shown(Path("/data/runs")) == "/data/runs"
    assert uri_of(storage / ".model.tmp" / "config.json") is None
    assert (
        with_uris(f"see {storage}/run, and '{storage}'")
        == f"see {shown(storage)}/run, and '{shown(storage)}'"
    )


def test_what_one_node_writes_the_other_pulls(storage: Path) -> None:
    here, there = storage / "run", other_node(storage / "run")
    files.write_json(here / "a.json", 1)
    files.write_json(here / "deep" / "b.json", 2)
    mirror.pull(there)
    assert files.read_json(there / "a.json") == 1 and files.read_json(there / "deep" / "b.json") == 2
    files.write_json(here / "a.json", 3)
    files.remove(here / "deep" / "b.json")
    mirror.pull(there)
    assert files.read_json(there / "a.json") == 3
    assert (there / "deep" / "b.json").exists(), "another process of the node may be about to publish it"
    mirror.pull(there, exactly=True)
    assert not (there / "deep" / "b.json").exists()


def test_a_write_that_the_bucket_refuses_changes_nothing(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage / "run" / "a.json"
    files.write_json(path, 1)

    def refuse(*_: object) -> None:
        raise OSError("refused")

    monkeypatch.setattr(mirror, "publish", refuse)
    with pytest.raises(OSError, match="refused"):
        files.write_json(path, 2)
    assert files.read_json(path) == 1 and list(path.parent.iterdir()) == [path]


def test_a_large_file_is_fetched_once_and_checked(storage: Path) -> None:
    here = storage / "tokens" / "log" / "shards" / "00000-000.arrow"
    files.write_bytes(here, os.urandom(100_000))
    expected = files.measure(here)
    there = other_node(here)
    assert mirror.fetch(there, expected) and there.read_bytes() == here.read_bytes()
    before = there.stat().st_mtime_ns
    assert mirror.fetch(there, expected) and there.stat().st_mtime_ns == before
    there.unlink()
    assert not mirror.fetch(there, {**expected, "xxh3_128": "0" * 32}), "what came is not what was written"
    assert not there.exists()
    assert not mirror.fetch(there.with_name("none.arrow"), expected)


def test_the_cache_keeps_to_its_limit(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "GRACE_SECONDS", -1.0)
    folder = storage / "tokens" / "log" / "shards"
    paths = [folder / f"{number:05d}-000.arrow" for number in range(5)]
    for age, path in enumerate(reversed(paths)):
        files.write_bytes(path, os.urandom(100_000))
        os.utime(path, (time.time() - 100 * age,) * 2)
    small = storage / "tokens" / "log" / "manifest.json"
    files.write_json(small, {})
    root = Path(*storage.parts[: storage.parts.index(FOLDER) + 1])
    monkeypatch.setenv(mirror.LIMIT_VARIABLE, "250000")
    mirror.trim(root)
    assert [path.exists() for path in paths] == [False, False, False, True, True] and small.exists()
    assert mirror.fetch(paths[0], files.measure(paths[3]) | {"size": 100_000}) is False
    assert mirror.size_of(paths[0]) == 100_000, "the bucket has it still"


def test_lines_of_several_writers_are_joined_on_every_node(storage: Path) -> None:
    path, there = storage / "run" / "metrics.jsonl", other_node(storage / "run" / "metrics.jsonl")
    with appended.appending(path, "000001"):
        appended.append(path, b'{"a":1}')
        appended.flush(path)
        appended.append(path, b'{"a":2}')
    appended.join(there)
    assert there.read_bytes() == b'{"a":1}\n{"a":2}\n'
    with appended.appending(there, "000002"):
        appended.append(there, b'{"a":3}')
    appended.join(there)
    appended.join(path)
    assert path.read_bytes() == there.read_bytes() == b'{"a":1}\n{"a":2}\n{"a":3}\n'
    with path.open("ab") as stream:
        stream.write(b'{"torn')  # killed while it joined
    appended.join(path)
    assert path.read_bytes() == there.read_bytes()
    with pytest.raises(Exists), appended.appending(path, "000002"):
        appended.append(path, b'{"a":4}')


def test_a_lease_is_taken_without_heartbeats(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.6)
    path = storage / "run" / ".lease"
    with lease.held(path, 0) as first:
        assert lease.holder(path) == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(RunBusy, match=f"process {os.getpid()} on"):
            Lease(other_node(path)).take(0)
        first._ended.set()  # as a process that was cut off
        first._thread.join()  # type: ignore[union-attr]
        with lease.held(other_node(path), 0) as second:
            second.require()
            first._ended.clear()
            first._beat()
            with pytest.raises(RunBusy):
                first.require()
    assert lease.holder(path) == ""
    with lease.held(path, 0):
        pass


def test_a_dead_process_of_this_machine_holds_nothing(storage: Path) -> None:
    path = storage / "run" / ".lease"
    dead = Lease(path)
    dead.take(0)
    dead._ended.set()
    content, version = dead._place.bucket.get(dead._place.key)
    dead._place.bucket.replace(dead._place.key, content.replace(b'"started":', b'"started":1'), version)
    with lease.held(path, 0):
        pass


# --- a run's folder in a bucket


def test_a_run_is_found_and_listed_by_its_uri(storage: Path) -> None:
    folder = RunFolder(storage / "first")
    folder.check_place("run")
    with folder.lease():
        folder.mark("run")
        folder.set_status("planning")
    uri = f"{shown(storage)}/first"
    assert find_run(uri).status()["state"] == "planning"
    assert find_run("first", shown(storage)).path == folder.path
    assert [each.path.name for each in runs_in(shown(storage))] == ["first"]
    with pytest.raises(RunError, match="no run"):
        find_run(f"{shown(storage)}/second")


def test_a_prefix_that_holds_something_else_is_refused(storage: Path) -> None:
    files.write_bytes(storage / "mine" / "thesis.docx", b"words")
    with pytest.raises(RunError, match=r"did not write: thesis\.docx"):
        RunFolder(other_node(storage / "mine")).check_place("run")


def test_a_stop_is_seen_on_another_node(storage: Path) -> None:
    here, there = RunFolder(storage / "run"), RunFolder(other_node(storage / "run"))
    assert not there.stop_asked()
    here.ask_to_stop()
    there._looked.clear()
    assert there.stop_asked()
    there.take_back_stop()
    here._looked.clear()
    assert not here.stop_asked()


def _state(folder: RunFolder, step: int, content: bytes, attempt: int) -> Commit:
    path = folder.checkpoint(step)
    file = state_folder(path, attempt) / "model.safetensors"
    files.write_bytes(file, content)
    return Commit(
        step=step, samples=4 * step, seen=Counts(tokens=100 * step), path=path, feed="feed", attempt=attempt,
        world_size=1, ledger=f"{attempt}-{step}", files={file.name: files.measure(file)},
    )  # fmt: skip


def test_of_two_attempts_that_commit_one_step_one_counts(storage: Path) -> None:
    here, there = RunFolder(storage / "run"), RunFolder(other_node(storage / "run"))
    first = commit(here, _state(here, 10, b"first", 1), 0, None)
    with pytest.raises(RunBusy):
        commit(there, _state(there, 10, b"second", 2), 0, None)
    third = RunFolder(Path(str(storage).replace("cache", "third")) / "run").refresh()
    found = newest_valid(third)
    assert found is not None and found.attempt == 1 and found.files == first.files
    assert (found.state / "model.safetensors").read_bytes() == b"first"
    assert ledger.damage(third, found.line) is None


def test_records_of_a_run_reach_the_other_node(storage: Path) -> None:
    here, there = RunFolder(storage / "run"), RunFolder(other_node(storage / "run"))
    with here.writer(1):
        here.append_metric({"kind": "train", "step": 1})
        here.flush()
        assert read_sealed_lines(there.refresh().metrics_file) == [{"kind": "train", "step": 1}]


def test_a_run_is_downloaded_without_what_is_not_its_own(storage: Path, tmp_path: Path) -> None:
    folder, place = RunFolder(storage / "run"), mirror.object_of(storage / "run")
    assert place is not None
    with folder.lease(), folder.writer(1):
        folder.mark("run")
        folder.set_status("finished")
        folder.append_metric({"kind": "train", "step": 1})
        commit(folder, _state(folder, 10, b"state", 1), 0, None)
    place.bucket.put(f"{place.key}/.model.tmp/config.json", b"{}")  # nothing that raydist writes there
    n_files, _ = find_run(shown(folder.path)).download(tmp_path / "all", checkpoints=True)
    copied = RunFolder(tmp_path / "all")
    there = sorted(p.relative_to(copied.path).as_posix() for p in copied.path.rglob("*") if p.is_file())
    step = "checkpoints/step-00000010"
    assert there == [
        ".raydist", f"{step}/COMMIT.json", f"{step}/model.safetensors", "ledger.jsonl", "metrics.jsonl",
        "status.json",
    ]  # fmt: skip
    assert n_files == len(there)
    found = newest_valid(copied)
    assert found is not None and found.step == 10, "it goes on as a run in a folder"
    with pytest.raises(RunError, match="is not empty"):
        folder.download(tmp_path / "all")
    with pytest.raises(RunError, match=r"runs in s3://.*: run"):
        find_run(f"{shown(storage)}/other")
