"""raydist's training loop against a bare PyTorch loop and Hugging Face's Trainer.

    raydist          packed blocks, attention kept within documents
    bare             the very same batches, made before the clock runs, and the least that trains on them
    trainer_packed   the very same blocks; attention crosses documents there, which is less work
    trainer_ragged   the very same documents, cut where a block cuts them: as many in a micro batch as raydist
                     has blocks, padded to the longest, and accumulated to as many tokens a step

All train the same model in one process with the same number of threads, in turn. Printed are the ratio to the
bare loop of the median seconds per step, and those to the Trainer of the median useful tokens per second;
padding is not useful. A step lasts from the end of the one before, so that all that happens between two is in
it: reading the batch, clipping, records. The first steps of a turn are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from raydist.api import prepare
from raydist.feed.loader import Step
from raydist.feed.packing import IGNORED
from raydist.folder import RunFolder
from raydist.job.load import load_job
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.model.attention.choose import Chosen
from raydist.model.build import Fitted, build_model, load_tokenizer, take_fitted
from raydist.model.loss import logits_of
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import Prepared
from raydist.training.hooks import Hook, StepResult
from raydist.training.loop import Attempt, train

CPU = torch.device("cpu")

JOB = Path(__file__).resolve().parent.parent / "jobs" / "quickstart.yaml"
PARAGRAPHS = "corpus.sources.stdlib.document=paragraph"
"""Documents that differ in length. Nearly all of quickstart's own, whole files, are longer than a block."""
WARM_UP_STEPS = 3
LEAST_STEPS = WARM_UP_STEPS + 2
BARE, PACKED, RAGGED = "bare", "trainer_packed", "trainer_ragged"
AIMS = {BARE: "at most 1.02", PACKED: "at least 1.0", RAGGED: "at least 1.5"}
"""Of raydist's seconds per step to the bare loop's, and of its useful tokens per second to the Trainer's."""

Clock = Callable[[], float]


class StepTime(NamedTuple):
    """tokens: those that are no padding."""

    seconds: float
    tokens: int


def main() -> None:
    options = parse()
    logging.getLogger("raydist").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = load_job(options.job, overrides(options, Path(folder)))
        prepared = prepare(job)
        clock = time.process_time if options.cpu_time else time.perf_counter
        sides: dict[str, Callable[[int], list[StepTime]]] = {
            "raydist": lambda turn: raydist_steps(prepared, clock, turn),
            BARE: lambda turn: bare_steps(prepared, clock),
            PACKED: lambda turn: trainer_steps(prepared, clock, ragged=False),
            RAGGED: lambda turn: trainer_steps(prepared, clock, ragged=True),
        }
        turns: dict[str, list[list[StepTime]]] = {name: [] for name in sides}
        for turn in range(options.repeats):
            for name in list(sides) if turn % 2 == 0 else reversed(sides):
                turns[name].append(sides[name](turn))
    tell(turns, options.threads, as_json=options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, default=JOB, help="a job file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="override a key of the job, as in raydist")
    parser.add_argument("--steps", type=int, default=30, help="steps a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: all)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU seconds of this process: for a machine that does other work, with --threads 1",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.steps < LEAST_STEPS:
        parser.error(
            f"--steps {options.steps} is too short, as warm-up steps do not count; give {LEAST_STEPS} or more"
        )
    return options


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    """One process, a length in steps, no evaluation and checkpoint between the first step and the last."""
    steps = options.steps
    fixed = {
        "name": "bench",
        "storage": folder,
        "train.max_tokens": "null",
        "train.epochs": "null",
        "train.max_steps": steps,
        "eval.eval_steps": steps,
        "eval.max_tokens": 1,
        "checkpoint.save_steps": steps,
        "scaling.num_workers": 1,
    }
    own = [PARAGRAPHS] if options.job == JOB else []
    return [*own, *options.set, *(f"{key}={value}" for key, value in fixed.items())]


def raydist_steps(prepared: Prepared, clock: Clock, turn: int) -> list[StepTime]:
    ends: list[float] = []
    tokens: list[int] = []

    class Ends(Hook):
        def on_step(self, attempt: Attempt, result: StepResult) -> None:
            ends.append(clock())
            tokens.append(result.counts.tokens + result.counts.eos)

    folder = RunFolder(Path(prepared.job.storage) / f"turn-{turn}")
    plan = make_plan(prepared.job, 1, prepared.feed().samples_per_epoch)
    train(attempt_spec(prepared, folder, plan, attempt=1), hooks=[Ends()])
    return measured(ends, tokens)


def bare_steps(prepared: Prepared, clock: Clock) -> list[StepTime]:
    """The least that trains the same model on the same batches."""
    job = prepared.job
    model = build_model(job, Path(prepared.tokenizer.folder), CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.lr, fused=True)
    ends, tokens = [], []
    for step in steps_of(prepared):
        for batch in step.micro_batches:
            logits = logits_of(model, batch)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss / step.n_labels).backward()
        if job.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(clock())
        tokens.append(step.n_tokens + step.n_eos)
    return measured(ends, tokens)


def trainer_steps(prepared: Prepared, clock: Clock, *, ragged: bool) -> list[StepTime]:
    """Hugging Face's Trainer with its defaults, on packed blocks or on the documents in them."""
    job, plan = prepared.job, make_plan(prepared.job, 1, prepared.feed().samples_per_epoch)
    blocks = [block for step in steps_of(prepared) for block in blocks_of(step)]
    samples = [document for block in blocks for document in block]
    if not ragged:
        samples = [list(itertools.chain.from_iterable(block)) for block in blocks]
    at_once, per_step = plan.micro_batch_size, len(samples) / plan.steps
    tokenizer = load_tokenizer(Path(prepared.tokenizer.folder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ends: list[float] = []
    tokens: list[int] = []

    def collate(samples: list[list[int]]) -> Any:
        tokens.append(sum(map(len, samples)))
        if ragged:
            return pad([{"input_ids": sample} for sample in samples])
        rest = [plan.block_size - len(sample) for sample in samples]  # best_fit leaves some blocks unfilled
        ids = [sample + [0] * n for sample, n in zip(samples, rest, strict=True)]
        labels = [sample + [IGNORED] * n for sample, n in zip(samples, rest, strict=True)]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    class Ends(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(clock())

    arguments = TrainingArguments(
        output_dir=str(Path(job.storage) / "trainer"),
        max_steps=plan.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=max(1, int(per_step / at_once)),
        learning_rate=job.train.lr,
        max_grad_norm=job.train.max_grad_norm or 0.0,
        bf16=job.train.mixed_precision == "bf16",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=job.train.logging_steps,
        disable_tqdm=True,
        report_to="none",
    )
    model = build_model(job, Path(prepared.tokenizer.folder), CPU, fit=use_sdpa)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=samples, callbacks=[Ends()])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its losses
        trainer.train()
    parts = arguments.gradient_accumulation_steps
    return measured(ends, [sum(tokens[i : i + parts]) for i in range(0, plan.steps * parts, parts)])


def use_sdpa(model: torch.nn.Module) -> None:
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    take_fitted(model, Fitted(Chosen("sdpa"), head=None, uncompiled="the peer is as its users run it"))


def steps_of(prepared: Prepared) -> list[Step]:
    job: Job = prepared.job
    plan = make_plan(job, 1, prepared.feed().samples_per_epoch)
    sizes = {"global_batch_size": plan.global_batch_size, "micro_batch_size": plan.micro_batch_size}
    return list(prepared.feed().loader(0, 1, 0, plan.samples, **sizes))


def blocks_of(step: Step) -> Iterator[list[list[int]]]:
    """The blocks of a step, each as its documents. A piece without a label is padding."""
    for batch in step.micro_batches:
        for ids, labels, lengths in zip(
            batch["input_ids"], batch["labels"], batch["document_lengths"], strict=True
        ):
            sizes = lengths[lengths > 0].tolist()
            pieces = zip(ids.split(sizes), labels.split(sizes), strict=True)
            yield [piece.tolist() for piece, its_labels in pieces if (its_labels != IGNORED).any()]


def measured(ends: list[float], tokens: list[int]) -> list[StepTime]:
    """A step lasts from the end of the one before."""
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return [StepTime(*each) for each in zip(seconds, tokens[1:], strict=True)][WARM_UP_STEPS:]


def tell(turns: dict[str, list[list[StepTime]]], threads: int, *, as_json: bool) -> None:
    """The ratios are of medians over all turns; those of each turn show the noise."""
    pooled = {name: [step for turn in of_side for step in turn] for name, of_side in turns.items()}
    by_turn = [{name: turns[name][i] for name in turns} for i in range(len(turns[BARE]))]
    result = {
        "threads": threads,
        "seconds_per_step": {name: round(seconds(steps), 5) for name, steps in pooled.items()},
        "useful_tokens_per_second": {name: round(rate(steps)) for name, steps in pooled.items()},
        "ratio": ratios(pooled),
        "ratio_of_each_turn": [ratios(turn) for turn in by_turn],
        "aim": AIMS,
    }
    if as_json:
        print(json.dumps(result))
        return
    for name, steps in pooled.items():
        print(f"{name:15} {seconds(steps):8.4f} s/step  {rate(steps):8,.0f} useful tokens/s")
    for name, aim in AIMS.items():
        each = " ".join(f"{ratios(turn)[name]:.3f}" for turn in by_turn)
        print(f"against {name:15} {ratios(pooled)[name]:.3f}  (aim: {aim}; turn by turn {each})")


def ratios(steps: dict[str, list[StepTime]]) -> dict[str, float]:
    ours = steps["raydist"]
    by_rate = {name: round(rate(ours) / rate(steps[name]), 4) for name in (PACKED, RAGGED)}
    return {BARE: round(seconds(ours) / seconds(steps[BARE]), 4), **by_rate}


def seconds(steps: list[StepTime]) -> float:
    return statistics.median(step.seconds for step in steps)


def rate(steps: list[StepTime]) -> float:
    return statistics.median(step.tokens / step.seconds for step in steps)


if __name__ == "__main__":
    main()
