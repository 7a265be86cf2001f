"""Planning and preparing a source of very many small files, against a bare walk that reads each of them.

Each side is a fresh process, so that its memory is its own. The disk's cache is warm: the files were just
written. Planning lists the files, hashes each one's content and orders the slices. Preparing is measured from
the plan to the complete token log, on a Ray that has started; its documents are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import xxhash

from raydist.cluster.connect import ray_session
from raydist.corpus.build import LogPlan, build_log, plan_log
from raydist.corpus.tokenizer import TokenizerSpec, open_tokenizer, train_tokenizer
from raydist.job.schema import Corpus, TrainSource

PLAN_SECONDS, PLAN_BYTES = 30.0, 10**9
"""The aim for 200,000 files."""
FILES_PER_FOLDER = 1000


def main() -> int:
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](options.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_files(folder / "files", options.files)
        train_tokenizer((text_of(i) for i in range(300)), 300, folder / "tokenizer")
        found = {side: measure(side, folder) for side in SIDES}
    found["ratio"] = {"plan / bare": found["plan"]["seconds"] / found["bare"]["seconds"]}
    print(json.dumps(found) if options.json else table(found, options.files))
    return int(found["prepare"]["documents"] != options.files)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200_000, help="how many (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def text_of(number: int) -> str:
    return f"small file {number:07d} holds these few words alone"


def write_files(folder: Path, n_files: int) -> None:
    for number in range(n_files):
        inside = folder / f"{number // FILES_PER_FOLDER:04d}"
        if number % FILES_PER_FOLDER == 0:
            inside.mkdir(parents=True)
        (inside / f"{number}.txt").write_text(text_of(number) + "\n")


def measure(side: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, Any], n_files: int) -> str:
    bare, plan, prepare = (found[side] for side in SIDES)
    return "\n".join(
        [
            f"{n_files:,} files",
            f"bare walk, read and hash  {bare['seconds']:6.1f} s  {bare['cpu_seconds']:.1f} s of CPU",
            f"raydist plans             {plan['seconds']:6.1f} s  {plan['cpu_seconds']:.1f} s of CPU;"
            f" {found['ratio']['plan / bare']:.1f} times; {plan['bytes'] / 1e6:,.0f} MB of memory",
            f"raydist prepares          {prepare['seconds']:6.1f} s"
            f"  {prepare['documents']:,} documents in {prepare['slices']} slices",
            f"the aim for 200,000: a plan in {PLAN_SECONDS:.0f} s and {PLAN_BYTES / 1e6:,.0f} MB",
        ]
    )


# --- the sides, each in a process of its own


def bare(folder: Path) -> dict[str, Any]:
    begin, digest = now(), xxhash.xxh3_128()
    for inside, _, names in os.walk(folder / "files"):
        for name in names:
            with open(f"{inside}/{name}", "rb") as stream:  # noqa: PTH123 - the barest there is
                digest.update(stream.read())
    return passed(begin)


def plan(folder: Path) -> dict[str, Any]:
    spec = tokenizer(folder)
    begin = now()
    n_slices = planned_log(folder, spec).n_slices
    return {**passed(begin), "bytes": peak_bytes(), "slices": n_slices}


def prepare(folder: Path) -> dict[str, Any]:
    with ray_session(0, 1):
        planned = planned_log(folder, tokenizer(folder))
        begin = now()
        log = build_log(planned, on_error="fail")
        took = passed(begin)
    return {**took, "documents": log.n_documents, "slices": planned.n_slices}


def tokenizer(folder: Path) -> TokenizerSpec:
    spec: TokenizerSpec = open_tokenizer(next((folder / "tokenizer").rglob("tokenizer.json")).parent).spec
    return spec


def planned_log(folder: Path, spec: TokenizerSpec) -> LogPlan:
    source = TrainSource(path=str(folder / "files"))
    return plan_log(source, Corpus(sources={"text": source}), spec, folder / "logs")


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def passed(begin: tuple[float, float]) -> dict[str, float]:
    """Since `now` said `begin`."""
    return {"seconds": now()[0] - begin[0], "cpu_seconds": now()[1] - begin[1]}


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SIDES = {"bare": bare, "plan": plan, "prepare": prepare}


if __name__ == "__main__":
    sys.exit(main())
