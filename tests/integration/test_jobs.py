"""The commands for a laptop at the head of jobs/*.yaml, a worker killed on the way: as if undisturbed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from raydist import files
from raydist.cli import main
from raydist.folder import RunFolder
from raydist.job.load import load_job
from raydist.job.plan import make_plan
from raydist.model.export import load_trained
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import find_prepared
from tests.integration.test_train_ray import workers
from tests.train_parts import losses, run_ranks
from tests.weights import weight_hash
from tests.whole_run import write_corpus

ROOT = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
FOR_THE_TEST = {
    "scaling.num_workers": 2,
    "checkpoint.save_steps": 5,
    "eval.max_tokens": 2000,
    "train.logging_steps": 1,
    "train.lr": 1e-3,
    "tracking.mlflow": "false",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model, random as it is, with a tokenizer of the text and tied embeddings."""
    folder = tmp_path_factory.mktemp("base")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(core.get_vocab()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def commands(name: str, base: Path, text: Path) -> list[str]:
    """The arguments of the command in the job's head, with what it leaves to the reader filled in."""
    head = (ROOT / "jobs" / f"{name}.yaml").read_text().partition("\n\n")[0]
    told = re.search(r"try it on a laptop:\n((?:#.*\\\n)*#.*)", head)
    assert told is not None
    command = re.sub(r"\\?\n?^#", " ", told[1], flags=re.MULTILINE)
    for place, value in (("<your text>", text), ("<a small model>", base)):
        assert place in command
        command = command.replace(place, str(value))
    words = shlex.split(command)
    assert words[:3] == ["raydist", "submit", f"jobs/{name}.yaml"]
    return words[3:]


def kill_a_worker(run: Path, step: int) -> None:
    while step not in losses(run):
        time.sleep(0.02)
    os.kill(workers()[1].pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("name", ["fsdp", "zero3", "qlora"])
def test_its_command_survives_a_kill_and_ends_as_two_undisturbed_ranks(
    name: str, base: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = [f"--set={key}={value}" for key, value in FOR_THE_TEST.items()]
    arguments = [*commands(name, base, text), *more, f"--set=storage={tmp_path}"]
    run = RunFolder(tmp_path / name)
    killer = threading.Thread(target=kill_a_worker, args=(run.path, 7), daemon=True)
    killer.start()
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(ROOT / "jobs" / f"{name}.yaml"), *arguments])
    killer.join()
    output = "".join(capfd.readouterr())
    assert ended.value.code == 0 and "a worker was lost" in output, output
    evaluations = [r["perplexity"] for r in files.read_jsonl(run.metrics_file) if r["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0]

    job = load_job(run.job_file)
    prepared = find_prepared(job, run.data()["pins"])
    undisturbed = attempt_spec(
        prepared, RunFolder(tmp_path / "undisturbed"), make_plan(job, 2, None), attempt=1
    )
    run_ranks(undisturbed)
    assert losses(run.path) == losses(undisturbed.run) and len(losses(run.path)) == 20
    assert weight_hash(run.model) == weight_hash(undisturbed.run / "model")
    if job.adapter is not None:
        check_merged(run, capfd)


def check_merged(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--merge"])
    assert ended.value.code == 0, capfd.readouterr()
    merged: Any = AutoModelForCausalLM.from_pretrained(run.path / "export" / "merged")
    ids = torch.arange(2, 200).unsqueeze(0)
    with torch.inference_mode():
        found, expected = merged(ids).logits, load_trained(run.model)(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
