"""Mirror a run into MLflow from its folder. A slow or absent server never holds up training.

    metrics.jsonl ──Tail──> thread ──log_batch──> tracking server
                              └── mlflow.json: run id, and the offset of what the server has

What a killed driver had not sent yet is sent by the next one. Steps that are trained again are logged
again: MLflow keeps both and shows the newest. A sweep has a run of its own, under which its trials stand.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
FILES = ("job.yaml", "report.html", "sweep.html", "best.yaml")
LONGEST_DELAY_SECONDS = 60.0

Warn = Callable[[str], None]


def tracking_uri(job: Job, folder: Path) -> str:
    """`mlflow: true` keeps a database beside `folder`, in the storage folder."""
    given = job.tracking.mlflow
    return given if isinstance(given, str) else f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


class MlflowTracker:
    """Follows the run in folder `run` from a thread of its own until `finish`; making it returns at once.

    `parent` is the id of the MLflow run under which a new one is put. `on_warning` is called from that
    thread, once, with the first thing that went wrong; what could not be sent is tried again until the
    run ends.
    """

    def __init__(
        self, job: Job, run: Path, *, on_warning: Warn, parent: str | None = None, poll_seconds: float = 2.0
    ) -> None:
        self._job, self._run, self._parent = job, run, parent
        self._on_warning, self._warned = on_warning, False
        self._poll_seconds, self._state = poll_seconds, ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def finish(self, state: str, timeout_seconds: float = 60.0) -> None:
        """Send the rest, the job and the report; `state` is the run's last (finished, failed, stopped)."""
        self._state = state
        self._ending.set()
        self._thread.join(timeout_seconds)
        with self._telling():
            if self._thread.is_alive():
                raise TimeoutError(f"no answer within {timeout_seconds:g} s")

    def _work(self) -> None:
        delay = self._poll_seconds
        while not self._ending.wait(delay):
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            with self._telling():
                self._mirror.send()
                delay = self._poll_seconds
        with self._telling():
            self._mirror.close(self._state)

    @cached_property
    def _mirror(self) -> _Mirror:
        """Made in the thread, and tried again until the server answers."""
        return _Mirror(self._job, self._run, self._parent)

    def _telling(self) -> AbstractContextManager[None]:
        return _telling(self._job, self._run, self._warn)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._on_warning(text)


def start_parent(job: Job, folder: Path, *, on_warning: Warn) -> str | None:
    """The id of the sweep's own run, made or found again; None if the server does not answer."""
    mirror = None
    with _telling(job, folder, on_warning):
        mirror = _Mirror(job, folder)
    return mirror.run_id if mirror else None


def finish_parent(
    job: Job, folder: Path, state: str, metrics: dict[str, float], params: dict[str, str], *, on_warning: Warn
) -> None:
    """End the sweep's run: `metrics`, the best trial's `params` as best.<key>, and the files of `folder`."""
    with _telling(job, folder, on_warning):
        mirror = _Mirror(job, folder)
        mirror.log_best(metrics, params)
        mirror.close(state)


@contextmanager
def _telling(job: Job, folder: Path, on_warning: Warn) -> Iterator[None]:
    """Whatever a tracking server does is a warning, and the work goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        told = f"MLflow at {redact(tracking_uri(job, folder))}: {redact(reason)[:500]}"
        on_warning(f"{told}; {folder} has everything")


class _Mirror:
    """One MLflow run, and how much of metrics.jsonl it holds."""

    def __init__(self, job: Job, folder: Path, parent: str | None = None) -> None:
        uri = tracking_uri(job, folder)
        self._client, self._folder = _client(uri), folder
        experiment, self._pin = self._experiment(uri), files.read_record(folder / "mlflow.json")
        same, wanted = self._pin.get("uri") == redact(uri), f"run_id = '{self._pin.get('run_id')}'"
        if not (same and self._client.search_runs([experiment], wanted)):
            tags = {"mlflow.parentRunId": parent} if parent else {}
            run = self._client.create_run(experiment, run_name=job.name, tags=tags)
            self._pin = {"uri": redact(uri), "run_id": run.info.run_id, "offset": 0}
            self._save()
        self.run_id = str(self._pin["run_id"])
        self._client.update_run(self.run_id, status="RUNNING")
        self._log_parameters(flatten(job.model_dump(mode="json")))

    def send(self) -> None:
        """Log the records that are new; on an error they are read again the next time."""
        tail = Tail(self._folder / "metrics.jsonl", self._pin["offset"])
        metrics = [metric for record in tail.poll() for metric in _metrics(record)]
        self._client.log_batch(self.run_id, metrics=metrics)
        if tail.offset != self._pin["offset"]:
            self._pin["offset"] = tail.offset
            self._save()

    def close(self, state: str) -> None:
        self.send()
        for path in (self._folder / name for name in FILES):
            if path.exists():
                self._client.log_text(self.run_id, redact(path.read_text()), path.name)
        self._client.set_terminated(self.run_id, STATUS[state])

    def _log_parameters(self, values: dict[str, str]) -> None:
        """A parameter of MLflow never changes; what a resumed job changed is a tag `resumed.<key>`."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", v) for key, v in values.items() if known.get(key, v) != v]
        self._client.log_batch(self.run_id, params=fresh, tags=changed)

    def log_best(self, metrics: dict[str, float], params: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self.run_id, _key(name), value)
        self._log_parameters({f"best.{key}": text for key, text in flatten(params).items()})

    def _save(self) -> None:
        files.write_json(self._folder / "mlflow.json", self._pin)

    def _experiment(self, uri: str) -> str:
        """Its id; made if there is none."""
        if found := self._client.get_experiment_by_name(EXPERIMENT):
            return str(found.experiment_id)
        # a server keeps artifacts itself; without one they would land in the working directory
        served = uri.startswith(("http://", "https://", "databricks"))
        artifacts = None if served else (self._folder.resolve().parent / "mlflow-artifacts").as_uri()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=artifacts))


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


def _key(name: str) -> str:
    """MLflow takes letters, digits and _ - . / space in names."""
    return re.sub(r"[^\w\-. /]", "_", name)
