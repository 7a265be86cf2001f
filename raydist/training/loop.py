"""The training loop: take a batch, step, and call the hooks; evaluate and commit when they are due."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from torch import Tensor

from raydist.bucket.objects import count_retries
from raydist.errors import OutOfMemory, Stopped, TrainingError, WorkerLost
from raydist.files import storage_watched
from raydist.folder import RunFolder
from raydist.job.functions import find_in
from raydist.model.build import fitted_of, n_parameters
from raydist.model.compiled import compile_seconds
from raydist.model.router import router_of
from raydist.model.work import work_of
from raydist.parallel.build import build_on_ranks, make_strategy
from raydist.parallel.footprint import FP32
from raydist.parallel.optimizer import state_bytes
from raydist.parallel.world import World, contact
from raydist.redact import redacted
from raydist.training.attempt_spec import AttemptSpec, TrainResult
from raydist.training.beat import beating
from raydist.training.behind import WriteBehind
from raydist.training.checkpoint import Checkpoints, Counts, Position
from raydist.training.collate import make_collator
from raydist.training.copies import copier
from raydist.training.data import Data, open_data
from raydist.training.evaluate import evaluate
from raydist.training.export import export
from raydist.training.hooks import (
    CommitOnRequest,
    Hook,
    KeepBest,
    MemoryFigures,
    ResizeOnRequest,
    StepResult,
    StopOnRequest,
    load_hooks,
)
from raydist.training.memory import memory_watched
from raydist.training.micro_batch import Found, find_micro_batch
from raydist.training.norms import Norms, Taken
from raydist.training.phases import Phases
from raydist.training.profiler import Profile
from raydist.training.progress import progress_written
from raydist.training.records import Records
from raydist.training.room import Room
from raydist.training.schedule import planned_rate
from raydist.training.shard_check import ShardCheck
from raydist.training.skips import Skips

if TYPE_CHECKING:
    from raydist.corpus.log import Shard
    from raydist.feed.loader import Step


def train(
    spec: AttemptSpec, world: World | None = None, *, hooks: Sequence[Hook] = (), data: Data | None = None
) -> TrainResult:
    """One rank of one attempt, from the newest checkpoint to the end or to a stop.

    world: this rank; by default the only one. Where there are more, the default process group exists
    already. hooks: called after all others, on every rank. data: opened from the spec by default.
    Raises WorkerLost when the other ranks cannot be reached, OutOfMemory when a micro batch does not fit,
    StorageError for what a disk refuses.
    """
    world, phases = world or World(), Phases("load", spec.seconds_before(), compiling=compile_seconds)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    find_in(spec.modules)
    folder, room, tried_again = RunFolder(spec.run), Room(spec, world.device), count_retries()
    with contextlib.ExitStack() as stack:
        stack.enter_context(storage_watched(spec.run))
        stack.enter_context(contact(world.rank))
        stack.enter_context(memory_watched(room))
        stack.enter_context(beating(folder.ranks(spec.attempt), world.rank, phases))
        if world.is_main:
            stack.enter_context(folder.writer(spec.attempt))
            stack.enter_context(progress_written(folder, spec.attempt, phases))
        room.require_fixed_parts()
        attempt = Attempt(spec, world, data or open_data(spec), phases, hooks)
        try:
            find_micro_batch(attempt, room)
            stopped = attempt.fit()
            if stopped:
                attempt.end()
            else:
                phases.begin("export")
                export(attempt)
        except (Stopped, WorkerLost, OutOfMemory):
            raise
        except Exception:
            attempt.shard_check.wait()  # a damaged shard may be why, and is raised in its place
            raise
        finally:
            attempt.shard_check.close()
            if again := tried_again():
                attempt.record("incident", what=f"requests to the bucket that were tried again: {again}")
            attempt.checkpoints.close()
            attempt.record("phases", seconds={name: round(spent, 3) for name, spent in phases.take().items()})
        at = attempt.position
        return TrainResult(
            stopped, at.step, at.samples, at.seen.tokens, at.evals, stopped and attempt.resizing
        )


class Attempt:
    """One rank between two steps: what is trained, how far it is, and what hooks asked for."""

    def __init__(
        self, spec: AttemptSpec, world: World, data: Data, phases: Phases, hooks: Sequence[Hook] = ()
    ) -> None:
        self.spec, self.job, self.plan, self.folder = spec, spec.job, spec.plan, RunFolder(spec.run)
        self.world, self.data, self.phases = world, data, phases
        self.micro_batch_found: Found | None = None
        self.collate = make_collator(self.job.train.collator)
        model = build_on_ranks(self.job, spec.tokenizer, world)
        self.fitted = fitted_of(model)
        self.n_parameters, self.n_trainable = n_parameters(model), n_parameters(model, trainable=True)
        self.work, self.router = work_of(model), router_of(model)
        self.state_bytes = self.n_trainable * FP32 + state_bytes(model, self.job.train)
        self.strategy = make_strategy(model, self.job, world, self.plan.accumulation_steps)
        self.position, self.skips = Position(), Skips(self)
        self.norms = Norms(self.folder, world, self.skips.look if self.job.guards.mode == "record" else None)
        self.checkpoints = Checkpoints(
            self.folder,
            world,
            self.strategy,
            feed=data.feed.fingerprint_at,
            attempt=spec.attempt,
            keep=self.job.checkpoint.save_total_limit,
        )
        self.shard_check = ShardCheck()
        self._check_shards(data.eval_shards)
        resumed = self.checkpoints.resume(lambda what: self.record("incident", what=what))
        self.resumed = resumed is not None
        self.position = resumed or self.position
        self.skips.resume(resumed)
        requests = [StopOnRequest(), ResizeOnRequest(), CommitOnRequest()]
        best = [KeepBest()] if self.job.checkpoint.load_best_model_at_end else []
        own = load_hooks(self.job.train.hooks)
        own += [Profile(spec.profile)] if spec.profile else []
        around = [*requests, WriteBehind(), *best, MemoryFigures(), *own, Records()]
        self.hooks: list[Hook] = [*around, *hooks]
        self.stopping = self.resizing = self._commit_asked = self._commit_wanted = False

    @property
    def step(self) -> int:
        """Steps made since the run began, with those that were skipped."""
        return self.position.step

    @property
    def samples(self) -> int:
        """The data position: samples read since the run began."""
        return self.position.samples

    @property
    def seen(self) -> Counts:
        """Tokens trained on since the run began."""
        return self.position.seen

    def fit(self) -> bool:
        """Train to the last step, or to a stop on request: then True."""
        for hook in self.hooks:
            hook.on_start(self)
        if self.step == 0:
            self._evaluate()
        self.phases.begin("first_step", self.step, self.plan.steps)
        for batch in self._batches():
            self._begin_segment()
            n_labels, counts, stop = self._agree(batch)
            lr = planned_rate(self.step, self.plan, self.job.train)
            loss = self._forward_backward(batch, n_labels)
            norm, taken = self._update(batch, loss, lr)
            self._advance(batch, counts, taken=taken)
            self.skips.act(lambda: self._commit_written(wait=True))
            flops = self.work.flops(batch.n_tokens + batch.n_eos + batch.n_bos, batch.documents)
            result = StepResult(*self._read(loss, norm), lr, counts, batch.wait_seconds, flops, taken)
            if result.loss is not None and self.router is not None:
                balance = self.world.sum_floats([self.router.sum_seen()])[0] / n_labels
                result.figures["router_aux_loss"] = balance
            for hook in self.hooks:
                hook.on_step(self, result)
            self.phases.begin("steps", self.step, self.plan.steps)
            if self._due(self.job.eval.eval_steps):
                self._evaluate()
            if self._due(self.job.checkpoint.save_steps) or stop or self._commit_asked:
                self._save()
            self._commit_written()
            if stop and self.step < self.plan.steps:
                break
        self.norms.check()
        return self.step < self.plan.steps

    def end(self) -> None:
        """The last commit, once it is written, and the end of the hooks."""
        self._commit_written(wait=True)
        for hook in self.hooks:
            hook.on_end(self, stopped=self.step < self.plan.steps)

    # --- what hooks ask for ------------------------------------------------------------------------

    def request_stop(self) -> None:
        """End after the next step and a checkpoint of it. Any rank may ask."""
        self.stopping = True

    def request_commit(self) -> None:
        """Make a checkpoint of this step. All ranks must ask alike."""
        self._commit_asked = True

    def want_commit(self) -> None:
        """Make a checkpoint after the next step. Any rank may ask."""
        self._commit_wanted = True

    def record(self, kind: str, *, step: int | None = None, **values: Any) -> None:
        """Append a record to metrics.jsonl, of this step if none is given. Only rank 0 writes."""
        if self.world.is_main:
            record = {"kind": kind, "step": self.step if step is None else step, **redacted(values)}
            self.folder.append_metric({**record, "attempt": self.spec.attempt, "time": time.time()})

    # --- a step ------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Step]:
        return self.data.feed.loader(
            self.world.rank,
            self.world.world_size,
            self.samples,
            self.plan.samples,
            global_batch_size=self.plan.batch_sizes,
            micro_batch_size=self.plan.micro_batch_sizes,
            while_waiting=self._end_with_the_run,
            on_shards=self._check_shards,
            on_next=self.shard_check.want_next if self.folder.remote and self.world.local_rank == 0 else None,
            collate=self.collate,
            place=copier(self.world.device),
        )

    def _begin_segment(self) -> None:
        """Where an extension begins, also when the attempt goes on from a checkpoint of this very step."""
        segment = self.plan.segment(self.step)
        if self.step == 0 or self.step != segment.first_step:
            return
        feed = self.data.feed
        self.record(
            "segment",
            number=self.plan.segments.index(segment) + 1,
            steps=segment.steps,
            rewarm=segment.rewarm,
            optimizer="reset" if segment.reset else "kept",
            weights={
                source.name: source.weight for source in feed.stages[feed.stage_number(self.samples)].sources
            },
        )
        self._evaluate(known=self.position.evals)
        self.skips.guard.clear_windows()
        if segment.reset:
            self.reset_optimizer()

    def reset_optimizer(self) -> None:
        self.strategy.reset_optimizer()
        taken = self.position.step - self.position.skipped.steps
        self.position = replace(self.position, forgotten=taken)

    def _check_shards(self, shards: Sequence[Shard]) -> None:
        """One rank of each node verifies them, in the background."""
        if self.world.local_rank == 0:
            self.shard_check.want(shards)

    def _agree(self, batch: Step) -> tuple[int, Counts, bool]:
        """Over all ranks: the step's labels, its tokens, and whether to stop after it."""
        own = [batch.n_labels, batch.n_tokens, batch.n_eos, batch.n_padding, batch.n_bos]
        n_labels, *counts, stop, commit = self.world.sum_ints([*own, self.stopping, self._commit_wanted])
        self._commit_asked, self._commit_wanted = self._commit_asked or commit > 0, False
        return max(n_labels, 1), Counts(*counts), stop > 0

    def _forward_backward(self, batch: Step, n_labels: int) -> Tensor:
        """This rank's share of the step's loss, fp64 scalar on the device; gradients are complete on return.

        Dropout is a function of (seed, step, rank, micro batch), so that a checkpoint holds no generator.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if self.router is not None:
            self.router.start()
        for index, micro_batch in enumerate(batch.micro_batches):
            place = struct.pack("<4q", self.job.seed, self.step, self.world.rank, index)
            torch.manual_seed(xxhash.xxh3_64_intdigest(place) >> 1)
            last = index == len(batch.micro_batches) - 1
            loss += self.strategy.forward_backward(micro_batch, n_labels, last=last)
        return loss

    def _update(self, batch: Step, loss: Tensor, lr: float) -> tuple[Tensor, bool]:
        """The gradient norm, scalar, not read yet unless guards ask for it; whether the step was taken."""
        step = Taken(self.step + 1, self.samples, loss, batch)
        try:
            norm = self.strategy.update(lr, self.job.train.max_grad_norm, self.skips.gate(step))
        except TrainingError as error:
            raise self.norms.located(error, step) from error
        if self.strategy.loss_scale is not None and self.strategy.loss_scale.bad:
            return norm, False
        if self.job.guards.mode != "on":
            self.norms.add(norm, step)
        return norm, not self.skips.refused

    def _advance(self, batch: Step, counts: Counts, *, taken: bool) -> None:
        skipped, seen = self.position.skipped, self.seen
        if taken:
            seen += counts
        else:
            skipped = skipped.add(batch.start, batch.stop, steps=1, tokens=counts.tokens)
        self.position = Position(
            step=self.step + 1,
            samples=batch.stop,
            seen=seen,
            skipped=skipped,
            forgotten=self.position.forgotten,
        )

    def _read(self, loss: Tensor, norm: Tensor) -> tuple[float | None, float | None]:
        """The step's loss over all ranks and its gradient norm, where they are recorded. A GPU waits then."""
        first = self.step == self.checkpoints.resumed_from + 1
        if not first and not self._due(self.job.train.logging_steps):
            return None, None
        self.norms.check()
        return self.world.sum_floats([loss.item()])[0], norm.item()

    def _due(self, every: int | Literal["epoch"]) -> bool:
        if every != "epoch":
            return self.step % every == 0 or self.step == self.plan.steps or self.step in self.plan.starts
        length = self.plan.samples_per_epoch or self.plan.samples
        return self.samples // length > (self.samples - self.plan.global_batch_size) // length

    # --- evaluations and checkpoints ---------------------------------------------------------------

    def _evaluate(self, known: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> None:
        """known: results of this very step, which are not made again."""
        self.norms.check()
        with self.phases.during("evaluation"):
            if not self._held_out_is_known():
                return
            missing = [data for data in self.data.eval_sets if data.name not in known]
            if known and not any(data.n_documents for data in missing):
                return
            results = evaluate(
                self.strategy.model,
                missing,
                self.world,
                self.plan.stages[-1].micro_batch_size,
                self.job.train.mixed_precision,
                self.phases.at,
            )
            evals = {result.source: result.to_json() for result in results}
            self.position = replace(self.position, evals={**known, **evals})
            for hook in self.hooks:
                hook.on_evaluate(self, evals)

    def _held_out_is_known(self) -> bool:
        """The held-out documents of lowest hash are known once the log is whole; the last step waits."""
        feed = self.data.feed
        if feed.complete:
            return True
        while self.step == self.plan.steps and not feed.completed and not self.folder.stop_asked():
            self._end_with_the_run()
            time.sleep(1)
        if not self.world.from_main(int(feed.completed)):
            return False
        while not feed.completed:  # another host may see a file later than rank 0 did
            time.sleep(1)
        self.data = open_data(self.spec)
        self._check_shards(self.data.eval_shards)
        return True

    def _end_with_the_run(self) -> None:
        """Called while the data does not go on: once the driver has given up, nothing more will come."""
        self.phases.heard()
        self.folder.look(self.folder.status_file)
        state = self.folder.status().get("state")
        if state != "training":
            raise TrainingError(f"the run is {state}: its token logs do not grow any more")

    def _save(self) -> None:
        self.norms.check()
        with self.phases.during("checkpoint"):
            self._commit_written(wait=True)
            position = self.skips.remembered(due=self._due(self.job.checkpoint.save_steps))
            self.checkpoints.save(position, self.shard_check.so_far())
            self._commit_asked = False
            if not self.checkpoints.behind:
                self._commit_written(wait=True)

    def _commit_written(self, *, wait: bool = False) -> None:
        """Commit the checkpoint that is being written, if it is written by now, or once it is."""
        with self.phases.during("checkpoint"):
            if commit := self.checkpoints.finish() if wait else self.checkpoints.poll():
                for hook in self.hooks:
                    hook.on_commit(self, commit)
