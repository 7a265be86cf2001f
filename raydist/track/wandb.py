"""A run in Weights & Biases: offline, as files for `wandb sync`, or online if WANDB_MODE says so.

Record k is always W&B's step k, and the run's folder keeps the run's id in W&B. Online, the server knows how
many records it has. Offline that is unknown, and syncing a run replaces it, so each driver rewrites the files
from the first record.
"""

from __future__ import annotations

import os
import shutil
import uuid

from raydist.errors import RunError
from raydist.folder import RunFolder
from raydist.job.identity import dotted_items
from raydist.job.schema import Job
from raydist.sealed import read_sealed, write_sealed
from raydist.track.records import Record, figures, flatten, key


class Wandb:
    """One W&B run. The x axis is the run's own `step`: W&B's cannot go back when steps are trained again."""

    def __init__(self, job: Job, run: RunFolder) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports over the network
        os.environ.setdefault("WANDB_SILENT", "true")  # else it asks for a key in the terminal
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        online = mode in ("online", "run")
        project = job.tracking.wandb if isinstance(job.tracking.wandb, str) else "raydist"
        values = job.model_dump(mode="json")
        numbers = {key(name): value for name, value in dotted_items(values) if isinstance(value, int | float)}
        self._run = wandb.init(
            id=_run_id(run, online=online),
            project=project,
            name=job.name,
            dir=run.path,
            config=flatten(values) | numbers,
            mode=mode,  # type: ignore[arg-type]  # W&B refuses a mode that it does not know
            resume="allow" if online else None,
            reinit="create_new",  # the program that calls raydist may have a run of its own
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,  # no command line, which may contain a secret
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.offset = self._n_records = 0

    def send(self, records: list[Record], offset: int) -> None:
        tracked = [(record, values) for record in records if (values := figures(record))]
        for index, (record, values) in enumerate(tracked, self._n_records):
            if index >= self._run.starting_step:
                own = {"step": record["step"], "_timestamp": record.get("time", 0)}
                self._run.log({**values, **own}, step=index)
        self.offset, self._n_records = offset, self._n_records + len(tracked)

    def close(self, state: str) -> None:
        self._run.finish(exit_code=int(state == "failed"))


def _run_id(run: RunFolder, *, online: bool) -> str:
    """The run's id in W&B, the same for every driver. Removes what earlier drivers wrote offline."""
    path = run.wandb_pin
    if not path.exists():
        write_sealed(path, {"run_id": uuid.uuid4().hex[:12]})
    fix = "restore it, or remove it: then the run gets a new id in W&B"
    run_id = str(read_sealed(path, RunError, fix, keys=("run_id",))["run_id"])
    for old in run.wandb.glob(f"offline-run-*-{run_id}") if not online else ():
        shutil.rmtree(old)
    return run_id
