"""A run in MLflow. The run's folder keeps the run's id in MLflow and how many records were sent.

Steps that are trained again are logged again: MLflow keeps both and shows the newer. A sweep has an MLflow
run of its own, the parent of its trials' runs.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from raydist.bucket import mirror
from raydist.errors import RunError
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.redact import redact
from raydist.sealed import read_sealed, write_sealed
from raydist.storage import Storage
from raydist.track.records import Record, figures, flatten, key
from raydist.track.tracker import Warn, warned

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "raydist"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def tracking_uri(job: Job, folder: RunFolder) -> str:
    """The job's tracking URI; for `mlflow: true` that of a database in the storage folder."""
    if isinstance(job.tracking.mlflow, str):
        return job.tracking.mlflow
    return f"sqlite:///{_own_storage(folder).mlflow_database}"


def _own_storage(folder: RunFolder) -> Storage:
    """Where the database of `mlflow: true` is: runs in a bucket cannot write one file together."""
    return Storage(folder.path if folder.remote else folder.path.resolve().parent)


def start_parent(job: Job, folder: RunFolder, *, on_warning: Warn) -> str | None:
    """The id of the sweep's MLflow run, created if there is none; None if the server does not answer."""
    parent = None
    with warned(name_of(job, folder), folder, on_warning):
        parent = Mlflow(job, folder)
    return parent.run_id if parent else None


def finish_parent(
    job: Job,
    folder: RunFolder,
    state: str,
    metrics: dict[str, float],
    params: dict[str, str],
    *,
    on_warning: Warn,
) -> None:
    """End the sweep's run with `metrics`, the best trial's `params` (best.<key>) and `folder`'s files."""
    with warned(name_of(job, folder), folder, on_warning):
        parent = Mlflow(job, folder)
        parent.log_best(metrics, params)
        parent.close(state)


def name_of(job: Job, folder: RunFolder) -> str:
    """The name of the server in warnings."""
    return f"MLflow at {redact(tracking_uri(job, folder))}"


class Mlflow:
    """One MLflow run, and how many records it has. parent: the id of the MLflow run above it, if any."""

    def __init__(self, job: Job, folder: RunFolder, parent: str | None = None) -> None:
        uri = tracking_uri(job, folder)
        database = _own_storage(folder).mlflow_database
        self._database = database if folder.remote and uri.endswith(str(database)) else None
        if self._database is not None:
            mirror.pull_file(self._database)
        self._client, self._folder = _client(uri), folder
        experiment, self._pin = self._experiment(uri), self._read_pin()
        same, wanted = self._pin.get("uri") == redact(uri), f"run_id = '{self._pin.get('run_id')}'"
        if not (same and self._client.search_runs([experiment], wanted)):
            tags = {"mlflow.parentRunId": parent} if parent else {}
            run = self._client.create_run(experiment, run_name=job.name, tags=tags)
            self._pin = {"uri": redact(uri), "run_id": run.info.run_id, "offset": 0}
            self._save()
        self.run_id = str(self._pin["run_id"])
        self._client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(flatten(job.model_dump(mode="json")))

    @property
    def offset(self) -> int:
        return int(self._pin["offset"])

    def send(self, records: list[Record], offset: int) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(record.get("time", 0) * 1000), record["step"])
            for record in records
            for name, value in figures(record).items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        self._pin["offset"] = offset
        self._save()

    def close(self, state: str) -> None:
        folder = self._folder
        for path in (folder.job_file, folder.report, folder.sweep_page, folder.best_file):
            if path.exists():
                self._client.log_text(self.run_id, redact(path.read_text(errors="replace")), path.name)
        self._client.set_terminated(self.run_id, STATUS[state])
        if self._database is not None:
            mirror.publish(self._database)
            mirror.publish_folder(_own_storage(folder).mlflow_artifacts)

    def _log_parameters(self, values: dict[str, str]) -> None:
        """MLflow parameters cannot change; values changed by a resumed job become tags `resumed.<key>`."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in values.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", v) for key, v in values.items() if known.get(key, v) != v]
        self._client.log_batch(self.run_id, params=new, tags=changed)

    def log_best(self, metrics: dict[str, float], params: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self.run_id, key(name), value)
        self._log_parameters({f"best.{name}": text for name, text in flatten(params).items()})

    def _read_pin(self) -> Record:
        """{} if there is none. Raises RunError for a damaged one: records could be sent twice or never."""
        path = self._folder.mlflow_pin
        fix = "restore it, or remove it: then all records are sent to a new MLflow run"
        return read_sealed(path, RunError, fix, keys=("uri", "run_id", "offset")) if path.exists() else {}

    def _save(self) -> None:
        write_sealed(self._folder.mlflow_pin, self._pin)

    def _experiment(self, uri: str) -> str:
        """The id of the experiment, which is created if there is none."""
        if experiment := self._client.get_experiment_by_name(EXPERIMENT):
            return str(experiment.experiment_id)
        # a server stores artifacts itself; without one MLflow would write them into the working directory
        served = uri.startswith(("http://", "https://", "databricks"))
        artifacts = None if served else _own_storage(self._folder).mlflow_artifacts.as_uri()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts))


def _client(uri: str) -> MlflowClient:
    """A client without MLflow's messages at start, its usage reports and its minutes of retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)
