"""Mirror a run into MLflow from its folder. A slow or absent server never holds up training.

    metrics.jsonl ──Tail──> thread ──log_batch──> tracking server
                              └── mlflow.json: run id, and the offset of what the server has

What a killed driver had not sent yet is sent by the next one. Steps that are trained again are logged
again: MLflow keeps both and shows the newest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydist import files
from raydist.job.schema import Job
from raydist.track.records import Record, Tail, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

EXPERIMENT = "raydist"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
NOT_METRICS = frozenset({"step", "attempt", "time"})
LONGEST_DELAY_SECONDS = 60.0


class MlflowTracker:
    """Follows the run from a thread of its own until `finish`; making it returns at once.

    `run` is the run's folder within the storage folder, where `mlflow: true` keeps its database.
    `on_warning` is called from that thread, once, with the first thing that went wrong; what could
    not be sent is tried again until the run ends.
    """

    def __init__(
        self, job: Job, run: Path, *, on_warning: Callable[[str], None], poll_seconds: float = 2.0
    ) -> None:
        given = job.tracking.mlflow
        self._uri = given if isinstance(given, str) else f"sqlite:///{run.resolve().parent / 'mlflow.db'}"
        self._job, self._run = job, run
        self._on_warning, self._warned, self._poll_seconds = on_warning, False, poll_seconds
        self._state = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def finish(self, state: str, timeout_seconds: float = 60.0) -> None:
        """Send the rest, the job and the report; `state` is the run's last (finished, failed, stopped)."""
        self._state = state
        self._ending.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._warn(f"no answer within {timeout_seconds:g} s")

    def _work(self) -> None:
        delay = self._poll_seconds
        while not self._ending.wait(delay):
            sent = self._try(lambda: self._mirror.send())
            delay = self._poll_seconds if sent else min(2 * delay, LONGEST_DELAY_SECONDS)
        self._try(lambda: self._mirror.close(STATUS[self._state]))

    @cached_property
    def _mirror(self) -> _Mirror:
        """Made in the thread, and tried again until the server answers."""
        return _Mirror(self._uri, self._job, self._run)

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, training goes on
            self._warn(f"{type(error).__name__}: {error}".split("\n")[0])
            return False
        return True

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            told = f"MLflow at {redact(self._uri)}: {redact(reason)[:500]}"
            self._on_warning(f"{told}; metrics.jsonl has everything")


class _Mirror:
    """One MLflow run, and how much of metrics.jsonl it holds."""

    def __init__(self, uri: str, job: Job, run: Path) -> None:
        self._client = _client(uri)
        self._folder, self._name, self._file = run, job.name, run / "mlflow.json"
        self._shown_uri = redact(uri)
        pin = files.read_record(self._file)
        if pin.get("uri") != self._shown_uri or not _alive(self._client, pin["run_id"]):
            pin = {"run_id": self._new_run(uri), "offset": 0}
        self.run_id: str = pin["run_id"]
        self._tail = Tail(run / "metrics.jsonl", pin["offset"])
        self._save()
        self._client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(flatten(job.model_dump(mode="json")))

    def send(self) -> None:
        """Log the records that are new; on an error they are read again the next time."""
        before = self._tail.offset
        try:
            metrics = [metric for record in self._tail.poll() for metric in _metrics(record)]
            self._client.log_batch(self.run_id, metrics=metrics)
        except Exception:
            self._tail.offset = before
            raise
        if self._tail.offset != before:
            self._save()

    def close(self, status: str) -> None:
        self.send()
        for name in ("job.yaml", "report.html"):
            if (self._folder / name).exists():
                self._client.log_text(self.run_id, redact((self._folder / name).read_text()), name)
        self._client.set_terminated(self.run_id, status)

    def _save(self) -> None:
        pin = {"uri": self._shown_uri, "run_id": self.run_id, "offset": self._tail.offset}
        files.write_json(self._file, pin)

    def _new_run(self, uri: str) -> str:
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # a server keeps artifacts itself; without one they would land in the working directory
            served = uri.startswith(("http://", "https://", "databricks"))
            artifacts = None if served else (self._folder.resolve().parent / "mlflow-artifacts").as_uri()
            experiment_id = self._client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        else:
            experiment_id = experiment.experiment_id
        run_id: str = self._client.create_run(experiment_id, run_name=self._name).info.run_id
        return run_id

    def _log_parameters(self, values: dict[str, str]) -> None:
        """A parameter of MLflow never changes; what a resumed job changed is a tag `resumed.<key>`."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", v) for key, v in values.items() if known.get(key, v) != v]
        self._client.log_batch(self.run_id, params=fresh, tags=changed)


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """{"train": {"lr": 0.1}} -> {"train.lr": "0.1"}; lists as JSON, credentials in URIs blanked out."""
    if isinstance(value, dict) and value:
        pairs = (flatten(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items())
        return {key: text for part in pairs for key, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {_key(path): redact(text)[:6000]}


def _metrics(record: Record) -> Iterator[Metric]:
    from mlflow.entities import Metric

    if record.get("kind") not in ("train", "eval"):
        return
    prefix = f"eval/{record['source']}/" if record["kind"] == "eval" else ""
    for name, value in record.items():
        if name not in NOT_METRICS and isinstance(value, int | float):
            key = _key(prefix + name.removeprefix("eval_"))
            yield Metric(key, float(value), int(record.get("time", 0) * 1000), record["step"])


def _client(uri: str) -> MlflowClient:
    """Without MLflow's start-up chatter, its usage reports over the network and its minutes of retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _alive(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        stage: str = client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return stage == "active"


def _key(name: str) -> str:
    """MLflow takes letters, digits and _ - . / space in names."""
    return re.sub(r"[^\w\-. /]", "_", name)
