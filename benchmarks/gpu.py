"""raydist, Hugging Face's Trainer and a bare compiled loop on one GPU, with random weights and documents.

    raydist            its own feed and loop, packed blocks with document masks, without Ray
    raydist-unmasked   the same with packing.document_mask: false
    ray                `raydist train` with one worker on an embedded Ray; of 124m, if Ray is installed
    trainer            Hugging Face's Trainer on the same blocks, with Liger's kernels if they are installed;
                       attention crosses documents there, since it has no fast way to keep them apart
    trainer-compiled   the same with torch_compile=True instead of Liger
    bare               each layer compiled in place, flex attention with a block mask per document, autocast

All train the same model. It needs torch, transformers, peft and this package, and bitsandbytes for QLoRA;
nothing is downloaded. Each side runs in a process of its own: Liger patches transformers' classes for good.

Printed, and written to a JSON file:
    tokens/s           without padding, at the median of the steps after warm-up
    MFU                6 N + 12 L D T operations a token, 4 N with a frozen base, over the card's dense bf16
                       peak (N parameters, L layers of width D, T tokens in a block)
    peak GiB           allocated by torch at most, from the start of the side on
    first step s       from the start of the side to the end of its first step, without imports
    the ratios of tokens/s, and the card's own limits, measured: a bf16 matrix product and a copy
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from raydist.corpus.log import Documents, SliceWriter
from raydist.corpus.log_folder import LogFolder
from raydist.feed.loader import Step
from raydist.files import read_json, write_json
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.model.layers import layers_of
from raydist.parallel.world import World
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.data import open_data
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train
from raydist.training.peak import peak_by_name

Figures = dict[str, Any]

LORA_RANK = 16
SIDES = ("raydist", "raydist-unmasked", "ray", "trainer", "trainer-compiled", "bare")
PRELOADED = ["raydist.training.loop", "transformers.models.llama.modeling_llama"]
"""Imported once for all sides, which are forked. Not the Trainer and peft: they import bitsandbytes, which
asks the card what it can do, and a process that has used CUDA can fork no user of it."""
LEAST_WITH_MASKS, LEAST_UNDER_RAY = 0.98, 0.98
"""Aims, as ratios of tokens per second: to the same without masks, to the loop alone."""
SIDE_SECONDS = 900
"""A side that takes longer is ended."""
QUICK_SECONDS = 220
"""What does not fit into that is left out under --quick: four minutes with the imports before."""


def llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": layers <= 12,
    }


@dataclass(frozen=True)
class Row:
    """block: tokens of a sequence.  sequences: of a step, in one micro batch.  method: full, lora or qlora.

    least_rate: tokens per second that raydist aims at on an H200.  least_ratio: to the faster Trainer.
    """

    name: str
    llama: dict[str, Any]
    block: int
    sequences: int
    method: str
    least_rate: int | None = None
    least_ratio: float = 1.3

    def config(self) -> Any:
        return AutoConfig.for_model("llama", **self.llama, max_position_embeddings=self.block)


SMALL = llama(768, 2048, 12, 12, 12, 49_152)
MIDDLE = llama(2048, 5504, 24, 16, 16, 49_152)
LARGE = llama(4096, 14_336, 32, 32, 8, 128_256)
ROWS = (
    Row("124m", SMALL, 1024, 64, "full", 540_000),
    Row("1.3b", MIDDLE, 2048, 8, "full", 57_000),
    Row("8b-lora", LARGE, 4096, 2, "lora", 16_000),
    Row("8b-qlora", LARGE, 4096, 2, "qlora", 14_500, 1.2),
    Row("1.3b-lora", MIDDLE, 2048, 8, "lora"),
)
DEFAULT = ("124m", "1.3b", "8b-lora", "8b-qlora")
QUICK = ("124m", "1.3b-lora")
QUICK_SIDES = ("raydist", "trainer", "bare", "trainer-compiled")
TOY = llama(32, 48, 2, 4, 2, 320)


@dataclass(frozen=True)
class Work:
    """What a process is given. folder: of the row, with its token log, tokenizer and, for LoRA, its base."""

    row: Row
    folder: Path
    steps: int
    warm_up: int
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def backend(self) -> str:
        """Of torch.compile. A toy is traced, but not compiled: that takes longer than all else together."""
        return "eager" if self.tiny else "inductor"

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def log(self) -> Path:
        return self.folder / "tokens" / "random"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def ray_figures(self) -> Path:
        return self.folder / "ray.json"


# --- the order of things -------------------------------------------------------------------------------


def main() -> None:
    options = parse()
    # before the processes start: they inherit it
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAY_USAGE_STATS_ENABLED="0")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that an import may ask whether there is a card
    card = in_process("card", Work(ROWS[0], Path(), 0, 0, options.tiny), Path(os.devnull))
    if "error" in card:
        sys.exit(f"{card['error']}\nThis benchmark needs a GPU; --tiny runs all of it on the CPU with toys.")
    result: Figures = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "card": card,
        "versions": versions(),
        "rows": [],
    }
    print(described(result), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in options.rows:
            work = Work(row, Path(folder) / row.name, options.steps, options.warm_up, options.tiny)
            result["rows"].append(measured_row(work, options, card["peak_bf16_flops"]))
            shutil.rmtree(work.folder)
            write_json(options.json, result)
    print(*(line for row in result["rows"] for line in verdicts(row)), sep="\n")
    if options.tiny:
        print("all of it ran; the figures of toys mean nothing")
    print(f"wrote {options.json}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = {row.name: row for row in ROWS}
    parser.add_argument("--row", action="append", choices=named, help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--side", action="append", choices=SIDES, help="default: all")
    parser.add_argument("--steps", type=int, help="steps that are measured (default: 20; 10 with --quick)")
    parser.add_argument("--quick", action="store_true", help=f"within four minutes: {', '.join(QUICK)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: does all of it work?")
    parser.add_argument("--folder", type=Path, help="for weights and data: 20 GB for 8b (default: temporary)")
    parser.add_argument("--json", type=Path, default=Path("build/bench-gpu.json"), help="(%(default)s)")
    options = parser.parse_args()
    options.rows = [named[name] for name in options.row or (QUICK if options.quick else DEFAULT)]
    options.sides = options.side or (QUICK_SIDES if options.quick else SIDES)
    options.deadline = time.monotonic() + (QUICK_SECONDS if options.quick else float("inf"))
    options.steps = options.steps or (2 if options.tiny else 10 if options.quick else 20)
    options.warm_up = 2 if options.tiny else 4 if options.quick else 6
    if options.tiny:
        options.rows = [replace(row, llama=TOY, block=64, sequences=2) for row in options.rows]
    options.logs = options.json.with_suffix(".logs")
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def measured_row(work: Work, options: argparse.Namespace, peak: float | None) -> Figures:
    """All sides of a row, and their ratios. A side that fails has an `error`; the others go on."""
    row, logs = work.row, options.logs
    with torch.device("meta"):
        n_parameters = AutoModelForCausalLM.from_config(row.config()).num_parameters()
    sizes = f"{n_parameters / 1e6:,.0f}M parameters, {row.method}, {row.sequences} x {row.block} tokens"
    print(f"\n{row.name}: {sizes}")
    print(f"  {'':40} {'tokens/s':>10} {'MFU':>6} {'peak GiB':>9} {'first step s':>13}", flush=True)
    write_tokenizer(work)
    write_log(work)
    if row.method != "full":
        in_process("base", work, logs / f"{row.name}-base.log", options.deadline)
    found: dict[str, Figures] = {}
    for side in options.sides:
        if side == "ray" and not (row.name == ROWS[0].name and importlib.util.find_spec("ray")):
            continue
        found[side] = figures = in_process(side, work, logs / f"{row.name}-{side}.log", options.deadline)
        if "error" not in figures:
            figures["mfu"] = mfu(figures["tokens_per_second"], row, n_parameters, peak)
        print(line_of(side, figures), flush=True)
    measured = {"n_parameters": n_parameters, "sides": found, "ratios": ratios(found)}
    return {**asdict(row), **measured}


def in_process(side: str, work: Work, log: Path, deadline: float = float("inf")) -> Figures:
    """What the side found, or {"error": why not}. Its output goes to `log`. deadline: of time.monotonic."""
    seconds = min(SIDE_SECONDS, deadline - time.monotonic())
    if seconds <= 0:
        return {"error": "left out, for the time of --quick is over"}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        child = processes.Process(target=run_side, args=(side, work, Path(answer.name), log))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
            return {"error": f"took longer than {seconds:.0f} s"}
        said = answer.read()
        return json.loads(said) if said else {"error": f"ended with {child.exitcode}; see {log}"}


def run_side(side: str, work: Work, answer: Path, log: Path) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if work.tiny:
        torch.set_num_threads(1)
    try:
        figures = RUN[side](work)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this side's result
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    sys.stdout.flush()
    answer.write_text(json.dumps(figures))


# --- the sides -----------------------------------------------------------------------------------------


class Marks:
    """The ends of the steps of a side: by events on a GPU, so that nothing waits for it."""

    def __init__(self, work: Work) -> None:
        self.work, self.began, self.first_step_seconds = work, time.perf_counter(), 0.0
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A step ends here."""
        if self.work.tiny:
            self._marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        if len(self._marks) == 1:
            self._wait()
            self.first_step_seconds = time.perf_counter() - self.began

    def _wait(self) -> None:
        if not self.work.tiny:
            torch.cuda.synchronize()

    @property
    def done(self) -> bool:
        return len(self._marks) >= self.work.all_steps

    def seconds(self) -> list[float]:
        """Of each step after the warm-up."""
        self._wait()
        pairs = itertools.pairwise(self._marks[self.work.warm_up - 1 :])
        return [b - a if self.work.tiny else a.elapsed_time(b) / 1e3 for a, b in pairs]

    def figures(self) -> Figures:
        seconds = self.seconds()
        tokens = statistics.fmean(step.n_tokens + step.n_eos for step in steps_of(self.work))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tokens_per_second": tokens / statistics.median(seconds),
            "step_seconds": [round(each, 6) for each in seconds],
            "peak_bytes": peak if self.work.tiny else torch.cuda.max_memory_allocated(),
            "first_step_seconds": self.first_step_seconds,
        }


class Done(Exception):
    """Ends raydist's loop before it writes a checkpoint, which for 1.3b takes a minute."""


class Ends(Hook):
    """Marks the ends of raydist's steps; the last one ends the attempt."""

    def __init__(self, marks: Marks) -> None:
        self.marks, self.attention = marks, ""

    def on_start(self, attempt: Attempt) -> None:
        self.attention = str(attempt.strategy.module.config._attn_implementation)  # type: ignore[union-attr]

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self.marks.mark()
        if self.marks.done:
            raise Done


def raydist_side(work: Work, *, masks: bool = True) -> Figures:
    hook = Ends(Marks(work))
    with contextlib.suppress(Done):
        train(spec_of(work, masks=masks), World(device=work.device), hooks=[hook])
    return {**hook.marks.figures(), "attention": hook.attention}


def trainer_side(work: Work, *, compiled: bool = False) -> Figures:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks = Marks(work)

    class MarkSteps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.mark()

    liger = not compiled and not work.tiny and importlib.util.find_spec("liger_kernel") is not None
    arguments = TrainingArguments(
        output_dir=str(work.folder / "trainer"),
        max_steps=work.all_steps,
        per_device_train_batch_size=work.row.sequences,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=work.tiny,
        use_liger_kernel=liger,
        torch_compile=compiled,
        torch_compile_backend=work.backend if compiled else None,
        dataloader_pin_memory=not work.tiny,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    samples = [block for step in steps_of(work) for block in plain_blocks(step)]
    Trainer(plain_model(work, "sdpa"), arguments, train_dataset=samples, callbacks=[MarkSteps()]).train()
    return {**marks.figures(), "liger": liger}


def bare_side(work: Work) -> Figures:
    """On CPU without flex attention, whose backward pass needs a GPU: there by transformers' own mask."""
    marks, device, row = Marks(work), work.device, work.row
    model = plain_model(work, "sdpa" if work.tiny else "flex_attention")
    for layer in layers_of(model):
        layer.compile(backend=work.backend, dynamic=False)
    summed = torch.compile(summed_cross_entropy, backend=work.backend, dynamic=False)
    block_mask = torch.compile(create_block_mask, backend=work.backend, dynamic=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for step in steps_of(work):
        (batch,) = (
            {name: on(device, tensor) for name, tensor in each.items()} for each in step.micro_batches
        )
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if not work.tiny:
            rule = same_document(batch["position_ids"])
            shape = (row.sequences, None, row.block, row.block)
            inputs["attention_mask"] = block_mask(rule, *shape, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = summed(model(**inputs, use_cache=False).logits, batch["labels"]) / step.n_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.mark()
    return marks.figures()


def same_document(position_ids: Tensor) -> Callable[..., Tensor]:
    """Flex attention's rule for positions (B, T) that begin again with each document."""
    document = (position_ids == 0).cumsum(1)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    return rule


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def plain_model(work: Work, attention: str) -> nn.Module:
    """What a user of transformers and peft has: fp32 weights, or a bf16 or NF4 base with LoRA."""
    row, options = work.row, {"attn_implementation": attention}
    if row.method == "qlora":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **nf4
        )
        options |= {"dtype": torch.bfloat16, "device_map": {"": str(work.device)}}
        model = AutoModelForCausalLM.from_pretrained(work.base, **options)
    else:
        dtype = torch.float32 if row.method == "full" else torch.bfloat16
        model = random_model(row, work.device, dtype=dtype, **options)
    if row.method != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model.train()


def random_model(row: Row, device: torch.device, **options: Any) -> nn.Module:
    with device:
        return AutoModelForCausalLM.from_config(row.config(), **options)


# --- under Ray -----------------------------------------------------------------------------------------


class EndsInFile(Hook):
    """For train.hooks of a run under Ray: writes the figures into the run's folder."""

    def __init__(self) -> None:
        said = json.loads(os.environ["RAYDIST_BENCH"])
        row, folder = Row(**said.pop("row")), Path(said.pop("folder"))
        began = said.pop("began")
        self.marks = Marks(Work(row=row, folder=folder, **said))
        self.marks.began = began

    def on_step(self, attempt: Attempt, result: StepResult) -> None:
        self.marks.mark()
        if self.marks.done:
            write_json(self.marks.work.ray_figures, self.marks.figures())
            attempt.request_stop()


def ray_side(work: Work) -> Figures:
    """`raydist train` of the same documents as text, to the end of the steps that count."""
    text = work.folder / "random.jsonl"
    write_text(work, text)
    job = job_of(work).model_dump(mode="json")
    job["name"] = "bench-ray"
    job["corpus"]["sources"]["random"]["path"] = str(text)
    job["train"]["hooks"] = ["gpu:EndsInFile"]
    job["scaling"]["use_gpu"] = not work.tiny
    write_json(work.folder / "job.yaml", job)
    began = time.perf_counter()  # the same clock in all processes
    given = json.dumps({**asdict(work), "folder": str(work.folder), "began": began})
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "RAYDIST_BENCH": given, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "raydist", "train", str(work.folder / "job.yaml")]
    subprocess.run(command, env=environment, check=True)
    found: Figures = read_json(work.ray_figures)
    return found


# --- the data ------------------------------------------------------------------------------------------


def job_of(work: Work, *, masks: bool = True) -> Job:
    row, steps = work.row, work.all_steps + 1  # the last one is not reached
    model = {"base": str(work.base)} if row.method != "full" else {"config": config_of(row)}
    return Job.model_validate(
        {
            "name": f"bench-{'masks' if masks else 'none'}",
            "storage": str(work.folder),
            "model": {**model, "tokenizer": str(work.tokenizer)},
            "corpus": {"sources": {"random": {"path": "random.jsonl"}}, "holdout": 0},
            "packing": {"block_size": row.block, "document_mask": masks},
            "train": {
                "max_steps": steps,
                "global_batch_size": row.sequences,
                "micro_batch_size": row.sequences,
                "lr": 1e-4,
            },
            "adapter": None if row.method == "full" else {"r": LORA_RANK, "alpha": 32, "dropout": 0},
            "quantization": "int4" if row.method == "qlora" else None,
            "checkpoint": {"save_steps": steps},
            "eval": {"eval_steps": steps},
            "tracking": {"mlflow": False},
        }
    )


def config_of(row: Row) -> dict[str, Any]:
    """The vocabulary is the tokenizer's."""
    sizes = {name: value for name, value in row.llama.items() if name != "vocab_size"}
    return {"model_type": "llama", "max_position_embeddings": row.block, **sizes}


def spec_of(work: Work, *, masks: bool = True) -> AttemptSpec:
    job = job_of(work, masks=masks)
    return AttemptSpec(
        job, work.folder / job.name, {"random": work.log}, work.tokenizer, make_plan(job, 1, None)
    )


def steps_of(work: Work) -> list[Step]:
    """The steps as raydist's feed gives them."""
    size, n = work.row.sequences, work.all_steps
    feed = open_data(spec_of(work)).feed
    return list(feed.loader(0, 1, 0, n * size, global_batch_size=size, micro_batch_size=size))


def plain_blocks(step: Step) -> Iterator[dict[str, Tensor]]:
    """Blocks as a user of the Trainer has them: it shifts labels itself."""
    for batch in step.micro_batches:
        yield from ({"input_ids": ids, "labels": ids} for ids in batch["input_ids"])


def documents(work: Work) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random tokens and the lengths of the documents in them, enough for all steps.

    Lengths are log-normal with a median of 450 and a mean of 740 tokens, like those of web pages; a toy's are
    a fortieth of that.
    """
    random, row = np.random.default_rng(0), work.row
    needed, lengths = (work.all_steps + 2) * row.sequences * row.block, []
    while sum(lengths) < needed:
        length = random.lognormal(np.log(450), 1) / (40 if work.tiny else 1)
        lengths.append(int(np.clip(length, 2, 100_000)))
    return random.integers(2, row.llama["vocab_size"], sum(lengths)), np.array(lengths)


def write_log(work: Work) -> None:
    tokens, lengths = documents(work)
    vocabulary = work.row.llama["vocab_size"]
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
    hashes = b"".join(xxhash.xxh3_128_digest(f"{number}".encode()) for number in range(len(lengths)))
    writer = SliceWriter(LogFolder(work.log), 0, ["random.jsonl"])
    writer.add(
        Documents(
            tokens=tokens.astype(dtype),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
            n_bytes=lengths.astype(np.int64) * 4,
            files=np.zeros(len(lengths), np.int32),
            rows=np.arange(len(lengths), dtype=np.int64),
        )
    )
    shards = writer.commit()["shards"]
    manifest = {
        "format": 1,
        "fingerprint": "random",
        "dtype": np.dtype(dtype).name,
        "vocab_size": vocabulary,
        "eos_token_id": 0,
        "tokenizer": "words",
        "shards": shards,
        "n_quarantined": 0,
        "n_empty": 0,
        **{key: sum(shard[key] for shard in shards) for key in ("n_documents", "n_tokens", "n_bytes")},
    }
    write_json(LogFolder(work.log).manifest_file, manifest)


def write_text(work: Work, path: Path) -> None:
    """The same documents as words, a token each."""
    tokens, lengths = documents(work)
    with path.open("w") as file:
        for piece in np.split(tokens, np.cumsum(lengths)[:-1]):
            file.write(json.dumps({"text": " ".join(f"w{token}" for token in piece)}) + "\n")


def write_tokenizer(work: Work) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<|endoftext|>", "<unk>", *(f"w{i}" for i in range(2, work.row.llama["vocab_size"]))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(work.tokenizer)


def write_base(work: Work) -> Figures:
    random_model(work.row, work.device, dtype=torch.bfloat16).save_pretrained(work.base)
    return {}


# --- the card ------------------------------------------------------------------------------------------


def card_side(work: Work) -> Figures:
    """What it can do: a bf16 matrix product, and a copy, which reads and writes each byte."""
    if not work.tiny and not torch.cuda.is_available():
        raise RuntimeError("torch.cuda.is_available() is false here")
    device, n, n_bytes = work.device, 256 if work.tiny else 8192, 2**20 if work.tiny else 2**31
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = best_seconds(work, lambda: a @ a), best_seconds(work, lambda: target.copy_(source))
    name = platform.processor() or "CPU"
    found: Figures = {"device": name if work.tiny else torch.cuda.get_device_name(device)}
    if not work.tiny:
        found |= {"memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    peak = peak_by_name(found["device"])
    return {
        **found,
        "peak_bf16_flops": None if work.tiny else peak,
        "matmul_flops": 2 * n**3 / product,
        "copy_bytes_per_second": 2 * n_bytes / copy,
    }


def best_seconds(work: Work, act: Callable[[], Any], *, repeats: int = 20) -> float:
    marks = Marks(replace(work, steps=repeats, warm_up=1))
    for _ in range(repeats + 1):
        act()
        marks.mark()
    return min(marks.seconds())


def versions() -> Figures:
    named = ("raydist", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "ray")
    found: Figures = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in named:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- what is said --------------------------------------------------------------------------------------


def mfu(tokens_per_second: float, row: Row, n_parameters: int, peak: float | None) -> float | None:
    """peak: operations per second. None where it is not known."""
    attention = 12 * row.llama["num_hidden_layers"] * row.llama["hidden_size"] * row.block
    per_token = (6 if row.method == "full" else 4) * n_parameters + attention
    return None if peak is None else per_token * tokens_per_second / peak


def ratios(sides: dict[str, Figures]) -> dict[str, float]:
    """Of tokens per second, for each pair of which both sides ended well."""
    rate = {side: figures["tokens_per_second"] for side, figures in sides.items() if "error" not in figures}
    pairs = [("raydist", other) for other in sides if other not in ("raydist", "ray")] + [("ray", "raydist")]
    return {f"{one} / {other}": rate[one] / rate[other] for one, other in pairs if {one, other} <= {*rate}}


def described(result: Figures) -> str:
    card, named = result["card"], result["versions"]
    product, copy = card["matmul_flops"] / 1e12, card["copy_bytes_per_second"] / 1e12
    limits = f"bf16 product {product:,.1f} TFLOP/s, copy {copy:.2f} TB/s (measured)"
    there = ", ".join(f"{name} {version}" for name, version in named.items() if version)
    missing = (
        "" if named["liger-kernel"] else "\nLiger is not installed: the Trainer runs without its kernels"
    )
    return f"{result['date']}  {card['device']}: {limits}\n{there}{missing}"


def line_of(side: str, figures: Figures) -> str:
    if "error" in figures:
        return f"  {side:40} failed: {figures['error']}"
    used = "n/a" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    peak, rate = figures["peak_bytes"] / 2**30, figures["tokens_per_second"]
    name = f"{side} ({figures['attention']})" if "attention" in figures else side
    name += " + Liger" if figures.get("liger") else ""
    return f"  {name:40} {rate:10,.0f} {used:>6} {peak:9.1f} {figures['first_step_seconds']:13.1f}"


def verdicts(row: Figures) -> Iterator[str]:
    """Each ratio, with the aim where there is one."""
    trainers = {k: v for k, v in row["ratios"].items() if k.startswith("raydist / trainer")}
    aims = {
        min(trainers, key=trainers.__getitem__, default=""): row["least_ratio"],
        "raydist / raydist-unmasked": LEAST_WITH_MASKS,
        "ray / raydist": LEAST_UNDER_RAY,
    }
    yield f"\n{row['name']}"
    for pair, ratio in row["ratios"].items():
        yield f"  {pair:30} {ratio:6.3f}" + (f"  (aim: at least {aims[pair]})" if pair in aims else "")
    if row["least_rate"] and "tokens_per_second" in row["sides"].get("raydist", {}):
        rate = row["sides"]["raydist"]["tokens_per_second"]
        yield f"  raydist, tokens/s       {rate:13,.0f}  (aim on an H200: at least {row['least_rate']:,})"


RUN: dict[str, Callable[[Work], Figures]] = {
    "card": card_side,
    "base": write_base,
    "raydist": raydist_side,
    "raydist-unmasked": lambda work: raydist_side(work, masks=False),
    "ray": ray_side,
    "trainer": trainer_side,
    "trainer-compiled": lambda work: trainer_side(work, compiled=True),
    "bare": bare_side,
}


if __name__ == "__main__":
    main()
