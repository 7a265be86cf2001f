"""Small real parts for the training tests: a tokenizer, token logs, jobs, ranks as processes."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from raydist.corpus.log import Documents, Ints, SliceWriter
from raydist.corpus.log_folder import LogFolder
from raydist.files import read_jsonl, write_json
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.parallel.world import World
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.checkpoint import Commit
from raydist.training.data import open_data
from raydist.training.hooks import Hook
from raydist.training.loop import Attempt
from raydist.training.schedule import learning_rate
from tests.fork_server import Rank

VOCABULARY = 64
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_tokenizer(folder: Path, *more: str) -> Path:
    """more: further tokens behind its own."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder)
    return folder


def write_log(path: Path, n_documents: int = 120, seed: int = 0) -> Path:
    """Documents of 1 to 40 tokens, each mostly a function of the one before: there is something to learn."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 40, n_documents)
    ids = [int(random.integers(2, VOCABULARY))]
    while len(ids) < lengths.sum():
        guess = (ids[-1] * 5 + 3) % (VOCABULARY - 2) + 2
        ids.append(guess if random.random() < 0.9 else int(random.integers(2, VOCABULARY)))
    shards = write_slice(path, 0, "random.txt", ids, lengths, str(seed))
    write_manifest(path, shards)
    return path


def write_slice(path: Path, number: int, file: str, ids: list[int], lengths: Ints, name: str) -> Any:
    """The shards of a slice: documents of these lengths. name: of which, with the row, hashes are made."""
    rows = range(len(lengths))
    hashes = b"".join(xxhash.xxh3_128_digest(f"{name}/{row}".encode()) for row in rows)
    documents = Documents(
        tokens=np.array(ids, np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
        n_bytes=lengths.astype(np.int64) * 4,
        files=np.zeros(len(lengths), np.int32),
        rows=np.arange(len(lengths), dtype=np.int64),
    )
    writer = SliceWriter(LogFolder(path), number, [file])
    writer.add(documents)
    return writer.commit()["shards"]


def write_manifest(path: Path, shards: list[dict[str, Any]]) -> None:
    totals = {key: sum(shard[key] for shard in shards) for key in ("n_documents", "n_tokens", "n_bytes")}
    manifest = {
        "format": 1,
        "fingerprint": path.name,
        "dtype": "uint16",
        "vocab_size": VOCABULARY,
        "eos_token_id": 0,
        "tokenizer": "words",
        "shards": shards,
        "n_quarantined": 0,
        "n_empty": 0,
        **totals,
    }
    write_json(path / "manifest.json", manifest)


def make_job(storage: Path, **sections: Any) -> Job:
    """A 20-step job of a tiny llama; `sections` are laid over its defaults one level deep."""
    defaults: dict[str, Any] = {
        "name": "run",
        "storage": str(storage),
        "seed": 7,
        "model": {"config": LLAMA, "tokenizer": "words"},
        "corpus": {"sources": {"random": {"path": "random.txt"}}, "holdout": 0.1},
        "packing": {"block_size": 32},
        "train": {
            "max_steps": 20,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "lr": 1e-2,
            "max_grad_norm": 0.5,
            "weight_decay": 0.1,
            "mixed_precision": "fp32",
            "logging_steps": 1,
        },
        "checkpoint": {"save_steps": 5},
        "eval": {"eval_steps": 10, "max_tokens": 400},
    }
    for name, values in sections.items():
        known = defaults.get(name)
        defaults[name] = (
            {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
        )
    return Job.model_validate(defaults)


def make_spec(
    storage: Path, *, world_size: int = 1, attempt: int = 1, run: str = "run", **sections: Any
) -> AttemptSpec:
    """Its log and tokenizer are made in `storage` where they are missing."""
    job = make_job(storage, **sections)
    log, tokenizer = storage / "tokens" / "log", storage / "words"
    if not log.exists():
        write_log(log)
        write_tokenizer(tokenizer)
    plan = make_plan(job, world_size, None)
    return AttemptSpec(job, storage / run, {"random": log}, tokenizer, plan, attempt)


def write_spec(spec: AttemptSpec) -> Path:
    """For `tests.rank`."""
    path = spec.run.parent / f"{spec.run.name}-{spec.attempt}.pickle"
    path.write_bytes(pickle.dumps(spec))
    return path


def start_ranks(spec: AttemptSpec) -> list[Rank]:
    """`spec` as torchrun would run it: a process per rank, on gloo."""
    return fork_ranks(write_spec(spec), spec.plan.world_size)


def fork_ranks(path: Path, size: int) -> list[Rank]:
    """`tests.rank` of that file in so many forked processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    return [
        Rank(path, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def run_ranks(spec: AttemptSpec) -> None:
    """To the end. Raises with the processes' errors when one of them fails."""
    finish(start_ranks(spec))


def finish(processes: list[Rank], seconds: float = 120) -> None:
    """Raises with the processes' errors where one fails, and with all their stacks where one hangs."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
    errors = [process.communicate()[1].decode() for process in processes]
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(errors))


def losses(run: Path) -> dict[int, float]:
    """The last recorded loss of each step."""
    return {r["step"]: r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "train"}


def training_blocks(spec: AttemptSpec) -> Any:
    return open_data(spec).feed


def plain_losses(spec: AttemptSpec, device: str | torch.device = "cpu") -> list[float]:
    """What anyone would write: stock masked attention, mean loss of the global batch, clip, AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM

    job, feed = spec.job, open_data(spec).feed
    torch.manual_seed(job.seed)
    given = job.model.config or {}
    options = {key: value for key, value in given.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": job.train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, size, found = torch.optim.AdamW(groups), spec.plan.global_batch_size, []
    for step in range(spec.plan.steps):
        samples = range(step * size, min((step + 1) * size, spec.plan.samples))
        batch = {
            name: torch.from_numpy(array).to(device) for name, array in feed.batch(list(samples)).items()
        }
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec.plan.steps, job.train)
        optimizer.step()
        found.append(loss.item())
    return found


class Cut(Exception):
    """Of a process that dies."""


class DyingAt(Hook):
    """Once the checkpoint of that step counts."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_commit(self, attempt: Attempt, commit: Commit) -> None:
        if commit.step == self._step:
            raise Cut


def stopped_and_resumed(
    storage: Path, after: int, world: World | None = None, **sections: Any
) -> tuple[Path, Path]:
    """Two runs of one rank: undisturbed, and stopped after that many steps and resumed."""
    from raydist.training.hooks import StopOnRequest
    from raydist.training.loop import train

    whole, cut = (make_spec(storage, run=run, **sections) for run in ("whole", "cut"))
    train(whole, world)
    asked = iter([False] * (after - 1) + [True])
    assert train(cut, world, hooks=[StopOnRequest(lambda: next(asked))]).stopped
    train(replace(cut, attempt=2), world)
    return whole.run, cut.run
