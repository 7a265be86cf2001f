"""What a disk refuses becomes a StorageError, whatever library met it; nothing half-written is left."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import save_file

from raydist import files
from raydist.errors import JobError, StorageError
from raydist.parallel.saver import Saver
from raydist.parallel.share import share_of
from raydist.parallel.world import World
from raydist.sealed import append_sealed, read_sealed_lines

LIMIT = 64 * 1024


@contextmanager
def small_files() -> Iterator[None]:
    """No file may be larger than LIMIT: the system refuses it with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


LARGE = {"weight": torch.zeros(LIMIT)}


def save_state(folder: Path, *, behind: bool) -> None:
    share = share_of(LARGE, 0, 1)
    saved = Saver(World()).save(folder, [*share], share.values(), {}, behind=behind, lasting=True)
    assert saved.done(within=60)


def in_a_task(folder: Path) -> None:
    try:
        (folder / "shard").write_bytes(bytes(2 * LIMIT))
    except OSError as error:
        raise RayTaskError("write", "remote traceback", error).as_instanceof_cause() from None


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "plain").write_bytes(bytes(2 * LIMIT)),
        lambda folder: save_file(LARGE, folder / "model.safetensors"),  # an error of Rust's
        lambda folder: save_state(folder, behind=False),
        lambda folder: save_state(folder, behind=True),  # in a thread
        in_a_task,
    ],
    ids=["python", "safetensors", "checkpoint", "checkpoint behind", "ray"],
)
def test_a_refused_write_is_named_however_deep_it_happened(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    with small_files(), pytest.raises(StorageError) as refused, files.storage_watched(tmp_path):
        write(tmp_path)
    assert str(refused.value).startswith(f"a file would be larger than is allowed: {tmp_path}")
    assert "ulimit" in refused.value.fix and refused.value.exit_code == 9


@pytest.mark.parametrize("code", files.REFUSALS)
def test_each_refusal_has_its_own_sentence(tmp_path: Path, code: int) -> None:
    error = files.storage_error(OSError(code, os.strerror(code), str(tmp_path / "x")), Path("elsewhere"))
    assert error is not None and error.what == f"{files.REFUSALS[code][0]}: {tmp_path / 'x'}"
    assert ("GB free" in error.where) == (code in files.FULL)


def test_what_no_disk_refused_stays_as_it_is() -> None:
    others = [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        PermissionError(errno.EACCES, "Permission denied"),  # of a socket
        JobError("No space left on device"),
        ValueError("7 of 9"),
    ]
    assert [files.storage_error(error, Path()) for error in others] == [None] * 4


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_sealed(path, {"step": 1})
    with small_files(), pytest.raises(OSError):
        append_sealed(path, {"text": "x" * 2 * LIMIT})
    append_sealed(path, {"step": 2})
    assert read_sealed_lines(path) == [{"step": 1}, {"step": 2}]


def test_who_may_read_the_folder_may_read_the_file(tmp_path: Path) -> None:
    for mode in (0o755, 0o700, 0o770):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")  # 0600, whatever the umask
        files.like_its_folder(folder / "model.safetensors")
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666


ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from raydist import files
from raydist.sealed import append_sealed, read_sealed_lines
from raydist.errors import StorageError
from raydist.folder import RunFolder
from raydist.run.lifecycle import at_the_end, state_after

disk = Path(sys.argv[1])
folder = RunFolder(disk / "run")
folder.reserve_status()
folder.set_status("training")
def conclude(error):
    folder.set_status(state_after(error), error=9999 * str(error))
try:
    with at_the_end(conclude, folder.path):
        with (disk / "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
except StorageError as error:
    print(error)
    print(folder.status()["state"], folder.status()["error"][:9], sorted(os.listdir(folder.path)))
"""


def on_a_small_disk(program: str, folder: Path, size: str) -> str:
    """What the program prints that has a disk of its own at `folder`; skips where nobody may mount one."""
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*probe, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a disk in a namespace")
    command = f'{mount} && exec "$@"'
    done = subprocess.run(
        [*probe, command, "sh", sys.executable, "-c", program, str(folder)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_named_and_the_status_says_failed(tmp_path: Path) -> None:
    told = on_a_small_disk(ON_A_FULL_DISK, tmp_path, "200k")
    assert f"no space is left on the disk: {tmp_path / 'run'}" in told and "with 0 GB free" in told
    assert told.splitlines()[-1] == "failed no space  ['status.json']"
