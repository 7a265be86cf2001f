"""A small job from raw text to a model, and `raydist submit` as a process that can be watched and killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil
import yaml

from raydist import files
from raydist.bucket.mirror import is_remote
from raydist.folder import RunFolder
from raydist.storage import Storage
from raydist.track.records import effective

STEPS = 40
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""A model small enough to be quick."""
SENTENCE = "the quick brown fox jumps over a lazy dog while rivers carry small stones toward some distant sea"


def write_corpus(path: Path, n_documents: int = 400) -> None:
    """Text with enough order in it that a tiny model learns something."""
    words = SENTENCE.split()
    documents = (
        " ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(20 + i % 90))
        for i in range(n_documents)
    )
    path.write_bytes(
        b"".join(orjson.dumps({"text": f"{i}: {text}."}) + b"\n" for i, text in enumerate(documents))
    )


def whole_job(corpus: Path, storage: Path) -> dict[str, Any]:
    """Small enough to be quick, slow enough (about 0.1 s a step) to be killed in the middle of one."""
    return {
        "name": "whole",
        "storage": str(storage),
        "model": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}},
        "corpus": {"sources": {"words": {"path": str(corpus)}}, "holdout": 0.05, "slice_bytes": 20000},
        "packing": {"block_size": 128},
        "train": {
            "max_steps": STEPS,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "lr": 3e-3,
            "mixed_precision": "fp32",
            "logging_steps": 1,
        },
        "scaling": {"num_workers": 2},
        "checkpoint": {"save_steps": 8},
        "eval": {"eval_steps": 20, "max_tokens": 2000},
        "tracking": {"mlflow": False},
    }


# --- the command as a process


def written(job: dict[str, Any]) -> str:
    """The path of the job, written into its storage; next to a node's cache, where that is a bucket."""
    at = os.environ["RAYDIST_CACHE"] + "-jobs" if is_remote(job["storage"]) else job["storage"]
    path = Path(at) / f"{job['name']}.yaml"
    files.write_text(path, yaml.safe_dump(job))
    return str(path)


def start(job: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    return _start("submit", job, *arguments)


def start_prepare(job: dict[str, Any]) -> subprocess.Popen[str]:
    return _start("prepare", job)


def start_tune(job: dict[str, Any]) -> subprocess.Popen[str]:
    return _start("tune", job)


def _start(command: str, job: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "raydist", command, written(job), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """The exit status and all output. Raises TimeoutExpired after so long, with the process killed."""
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill_everything(process)
            raise
        return process.returncode, output


def submit(job: dict[str, Any], *arguments: str) -> tuple[int, str]:
    return finish(start(job, *arguments))


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training workers of the Ray that it started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "TrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill_everything(process: subprocess.Popen[str]) -> None:
    """SIGKILL to it and to all that it started."""
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


# --- what the run has written


def folder_of(job: dict[str, Any]) -> RunFolder:
    return RunFolder(Storage(job["storage"]).path / job["name"])


def losses(folder: RunFolder) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in effective(folder) if "loss" in r}


def wait_for_step(folder: RunFolder, step: int, process: subprocess.Popen[str], attempt: int = 1) -> None:
    """Until the run's own metrics say that `step` of `attempt` is done: the next one is under way then."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if reached(folder, step, attempt):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def reached(folder: RunFolder, step: int, attempt: int) -> bool:
    records = files.read_jsonl(folder.refresh().metrics_file)
    return any("loss" in r and r["step"] >= step and r["attempt"] >= attempt for r in records)
