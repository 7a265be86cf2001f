"""What Ray itself prints in this process goes to a file: an error's own text says what people need."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_is_aside = False


@contextlib.contextmanager
def stderr_set_aside() -> Iterator[None]:
    """Python's stderr goes on to the terminal by a descriptor of its own, so that Ray's can be redirected.

    Without it `ray_output_to` leaves descriptor 2 alone: a program that uses raydist may need it.
    """
    global _is_aside  # descriptor 2 belongs to the whole process, too
    before = sys.stderr
    try:
        is_plain = before.fileno() == 2
    except (OSError, ValueError):  # captured, or closed
        is_plain = False
    if not is_plain:
        yield
        return
    with os.fdopen(os.dup(2), "w", buffering=1, encoding=before.encoding, errors=before.errors) as aside:
        sys.stderr, _is_aside = aside, True
        try:
            yield
        finally:
            sys.stderr, _is_aside = before, False


@contextlib.contextmanager
def ray_output_to(file: Path) -> Iterator[None]:
    """What Ray's own processes report, and where stderr is set aside what its C++ prints, goes to `file`.

    The file is removed at the end if nothing was written.
    """
    from ray._private import worker

    file.parent.mkdir(parents=True, exist_ok=True)
    lock, printed = threading.Lock(), worker.print_to_stdstream

    def keep(data: dict[str, Any], *_: Any, **__: Any) -> None:
        with lock, contextlib.suppress(OSError), file.open("a") as stream:
            stream.writelines(f"({data.get('pid', '')}) {line}\n" for line in data.get("lines", ()))

    worker.print_to_stdstream = keep
    try:
        with _descriptor_2_to(file):
            yield
    finally:
        worker.print_to_stdstream = printed
        if file.exists() and file.stat().st_size == 0:
            file.unlink()


@contextlib.contextmanager
def _descriptor_2_to(file: Path) -> Iterator[None]:
    if not _is_aside:
        yield
        return
    before = os.dup(2)
    with file.open("a") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
