"""The training loop: for each step of the feed, forward and backward, update, record, evaluate, commit."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from torch import Tensor

from raydist.errors import CheckpointError, TrainingError
from raydist.folder import RunFolder
from raydist.model.build import n_parameters
from raydist.model.export import full_state, save_model, saved_dtype
from raydist.parallel.strategy import Strategy, make_strategy
from raydist.parallel.weights import build_on_ranks
from raydist.parallel.world import World, contact
from raydist.training import checkpoint
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.card import model_card
from raydist.training.checkpoint import Commit, Counts
from raydist.training.collate import make_collator
from raydist.training.data import Data, open_data
from raydist.training.evaluate import evaluate
from raydist.training.memory import memory_watched
from raydist.training.metrics import Clock, MetricsWriter, memory_bytes, mfu
from raydist.training.schedule import learning_rate

if TYPE_CHECKING:
    from raydist.feed.loader import Step

OnCommit = Callable[[Commit], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class TrainResult:
    """stopped: on request, after a checkpoint and before the last step.  evals: the last, by source."""

    stopped: bool
    step: int
    samples: int
    tokens_seen: int
    evals: dict[str, dict[str, Any]]


def train(
    spec: AttemptSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    device: torch.device | None = None,
    on_commit: OnCommit | None = None,
    should_stop: ShouldStop | None = None,
    data: Data | None = None,
) -> TrainResult:
    """One rank of one attempt, from the newest checkpoint to the end or to a stop.

    With world_size above 1 the default process group exists already. on_commit is called on every
    rank, with the same commit. should_stop is asked on rank 0 at every step, beside the run's stop
    flag. data: opened from the spec by default. Raises WorkerLost when the other ranks cannot be reached,
    OutOfMemory when a micro batch does not fit.
    """
    world = World(rank, world_size, local_rank, device or torch.device("cpu"))
    writer = RunFolder(spec.run).writer() if world.is_main else contextlib.nullcontext()
    with contact(rank), memory_watched(spec.plan.micro_batches), writer:
        attempt = Attempt(spec, world, data or open_data(spec), on_commit, should_stop)
        return attempt.run()


class Attempt:
    """The state of one rank between steps."""

    def __init__(
        self,
        spec: AttemptSpec,
        world: World,
        data: Data,
        on_commit: OnCommit | None,
        should_stop: ShouldStop | None,
    ) -> None:
        self.spec, self.job, self.plan, self.run_folder = spec, spec.job, spec.plan, spec.run
        self.world, self.data = world, data
        self.on_commit, self.should_stop = on_commit, should_stop
        self.collate = make_collator(self.job.train.collator)
        self.metrics = MetricsWriter(spec.run, spec.attempt, enabled=world.is_main)
        model = build_on_ranks(spec.job, spec.tokenizer, world)
        self.n_parameters, self.n_trainable = n_parameters(model), n_parameters(model, trainable=True)
        self.strategy: Strategy = make_strategy(model, spec.job, world, spec.plan.accumulation_steps)
        self.last_commit = self._resume()
        self.step = self.last_commit.step if self.last_commit else 0
        self.samples = self.last_commit.samples if self.last_commit else 0
        self.seen = self.last_commit.seen if self.last_commit else Counts()
        self.evals = self.last_commit.evals if self.last_commit else {}
        self.resumed_from = self.step
        self.stretch = Counts()
        self.clock = Clock()

    def run(self) -> TrainResult:
        self._record_start()
        stopped = self._fit()
        if not stopped:
            self._export()
        return TrainResult(stopped, self.step, self.samples, self.seen.tokens, self.evals)

    def _fit(self) -> bool:
        """True when stopped on request."""
        if self.step == 0:
            self._evaluate()
        self.clock.resume()
        for batch in self._loader():
            self.clock.waited()
            self._record_stage()
            n_labels, counts, stop = self._agree(batch)
            lr = learning_rate(self.step, self.plan.steps, self.job.train)
            loss = self._forward_backward(batch, n_labels)
            norm = self._update(loss, lr)
            self._advance(batch, counts)
            if self._due(self.job.train.logging_steps) or self.step == self.resumed_from + 1:
                self._record_step(loss, lr, norm)
            if self._due(self.job.eval.eval_steps):
                self._evaluate()
            if self._due(self.job.checkpoint.save_steps) or stop or self._is_best_to_keep():
                self._checkpoint()
            if stop and self.step < self.plan.steps:
                return True
        return False

    def _loader(self) -> Any:
        return self.data.feed.loader(
            self.world.rank,
            self.world.world_size,
            self.samples,
            self.plan.samples,
            global_batch_size=[stage.global_batch_size for stage in self.plan.stages],
            micro_batch_size=[stage.micro_batch_size for stage in self.plan.stages],
            while_waiting=self._end_with_the_run,
            collate=self.collate,
        )

    def _agree(self, batch: Step) -> tuple[int, Counts, bool]:
        """Over all ranks: the step's labels, its tokens, and whether to stop after it."""
        own = [batch.n_labels, batch.n_tokens, batch.n_eos, batch.n_padding, self._asked_to_stop()]
        n_labels, tokens, eos, padding, stop = self.world.sum_ints(own)
        return max(n_labels, 1), Counts(tokens, eos, padding), stop > 0

    def _asked_to_stop(self) -> bool:
        if not self.world.is_main:
            return False
        return (self.run_folder / "stop").exists() or (self.should_stop is not None and self.should_stop())

    def _forward_backward(self, batch: Step, n_labels: int) -> Tensor:
        """This rank's share of the step's loss; gradients are complete on return."""
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for index, micro_batch in enumerate(batch.micro_batches):
            torch.manual_seed(self._dropout_seed(index))
            inputs = {name: tensor.to(self.world.device) for name, tensor in micro_batch.items()}
            last = index == len(batch.micro_batches) - 1
            loss += self.strategy.forward_backward(inputs, n_labels, last=last)
        return loss

    def _dropout_seed(self, index: int) -> int:
        return (
            xxhash.xxh3_64_intdigest(struct.pack("<4q", self.job.seed, self.step, self.world.rank, index))
            >> 1
        )

    def _update(self, loss: Tensor, lr: float) -> float:
        try:
            return self.strategy.update(lr, self.job.train.max_grad_norm)
        except TrainingError as error:
            total = self.world.sum_floats([loss.item()])[0]
            raise TrainingError(
                f"step {self.step + 1}: {error.what}, the loss {total:.6g}",
                where=f"{self.run_folder}, the global batch from sample {self.samples} on",
                why=error.why,
                fix=error.fix,
            ) from error

    def _advance(self, batch: Step, counts: Counts) -> None:
        self.step, self.samples, self.evals = self.step + 1, batch.stop, {}
        self.seen, self.stretch = self.seen + counts, self.stretch + counts
        self.clock.stepped(counts.tokens)

    def _due(self, every: int | Literal["epoch"]) -> bool:
        if every != "epoch":
            return self.step % every == 0 or self.step == self.plan.steps
        length = self.plan.samples_per_epoch or self.plan.samples
        return self.samples // length > (self.samples - self.plan.global_batch_size) // length

    # --- records -----------------------------------------------------------------------------------

    def _record_start(self) -> None:
        kind = "start" if self.last_commit is None else "resume"
        self.metrics.write(
            kind,
            self.step,
            samples=self.samples,
            steps=self.plan.steps,
            world_size=self.world.world_size,
            micro_batch_size=self.plan.micro_batch_size,
            n_parameters=self.n_parameters,
            n_trainable=self.n_trainable,
            device=str(self.world.device.type),
        )
        if not self.data.feed.complete:
            told = "the token logs are still growing; evaluations begin when they are whole"
            self.metrics.write("incident", self.step, what=told)
        for empty in (data.name for data in self.data.eval_sets if not data.n_documents):
            self.metrics.write(
                "incident", self.step, what=f"{empty} has no held-out document, so it is not evaluated"
            )

    def _record_stage(self) -> None:
        """At the first step of each stage but the first."""
        ends = list(itertools.accumulate(stage.samples for stage in self.plan.stages[:-1]))
        if self.samples in ends:
            number = ends.index(self.samples) + 1
            size = self.plan.stages[number].block_size
            self.metrics.write("stage", self.step, number=number + 1, block_size=size)

    def _record_step(self, loss: Tensor, lr: float, norm: float) -> None:
        total = self.world.sum_floats([loss.item()])[0]
        figures = self.clock.read()
        self.metrics.write(
            "train",
            self.step,
            loss=total,
            tokens_seen=self.seen.tokens,
            samples=self.samples,
            learning_rate=lr,
            grad_norm=norm,
            **figures,
            mfu=mfu(
                figures["tokens_per_second"], self.n_parameters, self.world.world_size, self.world.device
            ),
            memory_bytes=memory_bytes(self.world.device),
        )
        self.clock.resume()

    def _know_held_out(self) -> bool:
        """The held-out documents of lowest hash are known once the log is whole; the last step waits."""
        feed = self.data.feed
        if feed.complete:
            return True
        while self.step == self.plan.steps and not feed.completed and not (self.run_folder / "stop").exists():
            self._end_with_the_run()
            time.sleep(1)
        if not self.world.from_main(int(feed.completed)):
            return False
        while not feed.completed:  # another host may see a file later than rank 0 did
            time.sleep(1)
        self.data = open_data(self.spec)
        return True

    def _end_with_the_run(self) -> None:
        """Called while the data does not go on: once the driver has given up, nothing more will come."""
        state = RunFolder(self.run_folder).status().get("state")
        if state != "training":
            raise TrainingError(f"the run is {state}: its token logs do not grow any more")

    def _evaluate(self) -> None:
        if not self._know_held_out():
            return
        precision = self.job.train.mixed_precision
        results = evaluate(
            self.strategy.model,
            self.data.eval_sets,
            self.world,
            self.plan.stages[-1].micro_batch_size,
            precision,
        )
        self.evals = {result.source: result.to_json() for result in results}
        for record in self.evals.values():
            self.metrics.write("eval", self.step, **record)
        self.clock.resume()

    # --- checkpoints -------------------------------------------------------------------------------

    def _resume(self) -> Commit | None:
        """Rank 0 finds the newest checkpoint that verifies; all ranks load it."""
        found = self._find() if self.world.is_main else None
        step = self.world.from_main(found.step if found else -1)
        if step < 0:
            return None
        found = found or checkpoint.read_commit(checkpoint.folder_of(self.run_folder, step))
        checkpoint.check_same_data(found, self.data.feed.fingerprint)
        self.strategy.load(found.path, found.step)
        return found

    def _find(self) -> Commit | None:
        def tell(error: CheckpointError) -> None:
            self.metrics.write(
                "incident", 0, what=f"a damaged checkpoint was passed over: {error.what} ({error.where})"
            )

        found = checkpoint.newest_valid(self.run_folder, tell)
        checkpoint.tidy(self.run_folder, found)
        return found

    def _is_best_to_keep(self) -> bool:
        """With load_best_model_at_end a best evaluation is kept also between the regular checkpoints."""
        if not self.job.checkpoint.load_best_model_at_end or not self.evals:
            return False
        best = checkpoint.best(self.run_folder) if self.world.is_main else None
        better = best is None or self._planned(self.run_folder).eval_loss < best.eval_loss  # type: ignore[operator]
        return bool(self.world.from_main(int(better)))

    def _planned(self, folder: Path) -> Commit:
        fingerprint, size = self.data.feed.fingerprint, self.world.world_size
        return Commit(
            folder, self.step, self.samples, fingerprint, self.spec.attempt, size, self.seen, self.evals
        )

    def _checkpoint(self) -> None:
        folder = checkpoint.folder_of(self.run_folder, self.step)
        if self.world.is_main:
            checkpoint.begin(self.run_folder, self.step)
        self.world.from_main(0)  # the folder is there
        self.strategy.save(folder)
        self.world.from_main(0)  # every rank's files are there
        planned = self._planned(folder)
        if self.world.is_main:
            planned = checkpoint.commit(
                self.run_folder, planned, self.resumed_from, self.last_commit, self.stretch
            )
            checkpoint.retain(self.run_folder, self.job.checkpoint.save_total_limit)
            self.metrics.write("commit", self.step, samples=self.samples, ledger=planned.ledger)
        self.last_commit, self.stretch = planned, Counts()
        if self.on_commit is not None:
            self.on_commit(planned)
        self.clock.resume()

    # --- the end -----------------------------------------------------------------------------------

    def _export(self) -> None:
        """Rank 0 writes model/: the last weights, or the best evaluated ones."""
        exported = self._load_best() or self._planned(self.run_folder)
        module = self.strategy.module
        dtype = saved_dtype(self.job) if self.job.adapter is None else None
        main = self.world.is_main
        state = full_state(module, dtype, gather_full=self.strategy.gather_full, keep=main)
        if self.world.is_main:
            card = model_card(self.spec, exported)
            save_model(module, state, self.job, self.spec.tokenizer, self.run_folder / "model", card)

    def _load_best(self) -> Commit | None:
        """The commit whose weights the strategy now holds; None when they are the last step's."""
        if not self.job.checkpoint.load_best_model_at_end:
            return None
        found = checkpoint.best(self.run_folder) if self.world.is_main else None
        step = self.world.from_main(found.step if found else -1)
        if step in (-1, self.step):
            return None
        best = checkpoint.read_commit(checkpoint.folder_of(self.run_folder, step))
        self.strategy.load(best.path, None)
        self.metrics.write("incident", self.step, what=f"model/ is of step {step}, which evaluated best")
        return best
