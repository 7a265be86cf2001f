"""No secret that a job, a path or a library's message holds leaves the process in any text."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raydist.autotrain.params import LLMTrainingParams
from raydist.corpus.files import list_files
from raydist.errors import CorpusError, JobError, RaydistError, RunError
from raydist.folder import RunFolder
from raydist.job.identity import differences
from raydist.job.load import job_yaml, load_job
from raydist.job.schema import Job, Source
from raydist.redact import is_redacted, redact, redacted
from raydist.run.lifecycle import Life
from raydist.track.listener import Listener
from raydist.track.records import flatten
from raydist.track.report import write_report
from raydist.track.start import check_trackers

ROOT = Path(__file__).resolve().parents[2]
C = "CANARY"
CANARIES = [
    f"https://ann:{C}@host/x.jsonl",
    f"s3://AKIA0:{C}/a+b/c@bucket/x.jsonl",
    f"s3://AKIA0:{C} with spaces@bucket/x.jsonl",
    f"s3://AKIA0:{C}@{C}@bucket/x.jsonl",
    f"s3://AKIA0:{C}'{C}@bucket/x.jsonl",
    f"redis://:{C}@host:6379/0",
    f"https://{C}@host/x.jsonl",
    f"https://host/x.jsonl?token={C}",
    f"https://host/x.jsonl?sv=1&sig={C}%2Fab%3D&se=2",
    f"s3://bucket/x.jsonl?secret_key={C}/x&region=eu",
    f"abfs://c@acct/x.jsonl?account_key={C}==",
    f"gs://bucket/x.jsonl?credentials={C}",
    f"https://host/x.jsonl?X-Amz-Signature={C}&X-Amz-Credential={C}/20261126",
    f"https://host/x.jsonl?password={C}#top",
    f"hf://datasets/ann:hf_{C}abcdefgh/x.jsonl",
    f"https://host/ghp_{C}0123456789/x.jsonl?of=x%3Ahf_{C}0123",
    f"postgresql://ann:{C}#!@db:5432/x?sslpassword={C}",
    f"http://host/x.jsonl?api_key={C}",
    f"DefaultEndpointsProtocol=https;AccountKey={C}==;EndpointSuffix=core",
    f"https://host/x.jsonl?access_token={C}&refresh_token={C}",
]


class Quiet(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def a_job(storage: Path, **tracking: Any) -> Job:
    sources = {f"s{n}": {"path": uri} for n, uri in enumerate(CANARIES)}
    clean = [{"characters": {"pattern": "x", "password": C}}]
    values = {
        "name": "r",
        "storage": str(storage),
        "model": {"config": {"model_type": "llama"}, "tokenizer": f"https://ann:{C}@hub/t"},
        "corpus": {"sources": sources, "clean": clean},
        "train": {"max_steps": 1},
        "tracking": {"mlflow": f"http://ann:{C}@host:5000", **tracking},
    }
    return Job.model_validate(values)


def test_no_canary_is_found_in_any_text() -> None:
    for uri in CANARIES:
        told = f"[Errno 5] cannot read {uri!r}: {uri} (of '{uri}', see \"{uri}\")\n  {uri}\nand go on"
        assert C not in redact(told), redact(told)
        assert redact(redact(told)) == redact(told) and redact(told).endswith("and go on")
        assert is_redacted(redact(uri))
    bearer = f"Authorization: Bearer {C}0123456789abcdef"
    for text in (f'{{"secret_key": "{C} x"}}', f"hf_token: {C}", bearer):
        assert C not in redact(text)
    assert redacted({"password": C, "n": [1, {"uri": CANARIES[0]}]}) == {
        "password": "***",
        "n": [1, {"uri": "https://***@host/x.jsonl"}],
    }


def test_what_is_no_secret_stays() -> None:
    for text in (
        "write to ann@example.org",
        "no server at http://127.0.0.1:5000/ for ann@example.org",
        "hf://datasets/ann/x@main/y.jsonl",
        "https://host:8080/x.jsonl?region=eu&version=2",
        "--set packing.add_eos_token=false; eos_token=<s>, max_tokens: 5, tokenizer: x",
        "start it with RAY_AUTH_MODE=token and ~/.ray/auth_token",
        "signature: of f; key=5; design=abcd; credentials: see SECURITY.md",
    ):
        assert redact(text) == text
    assert redact("postgresql://ann:hunter2@db:5432/x?password=pw&ssl=1") == (
        "postgresql://***@db:5432/x?password=***&ssl=1"
    )


def test_an_error_shows_none_however_it_travels() -> None:
    for kind in (RaydistError, CorpusError, RunError):
        error = kind(CANARIES[0], where=CANARIES[1], why=CANARIES[2], fix=CANARIES[3])
        for travelled in (error, pickle.loads(pickle.dumps(error))):
            assert C not in f"{travelled}{travelled!r}{travelled.args}{travelled.what}{travelled.where}"


@pytest.mark.parametrize("error", [OSError, CorpusError])
def test_nothing_in_a_runs_folder_holds_one(tmp_path: Path, error: type[Exception]) -> None:
    job, told = a_job(tmp_path), Quiet()
    life = Life(job, "run", told)
    with pytest.raises(error), life.held(), life.begun():
        raise error("; ".join(CANARIES))
    write_report(life.folder)
    written = {path.name: path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert {"raydist-job.yaml", "status.json", "report.html"} <= written.keys()
    assert not [name for name, text in written.items() if C in text]
    assert C not in str([told.said, flatten(job.model_dump(mode="json"))])


def test_a_run_goes_on_with_its_secrets_and_with_others(tmp_path: Path) -> None:
    """The run's folder has none of them, so they are no part of what it is."""
    job = a_job(tmp_path)
    with (life := Life(job, "run", Quiet())).held(), life.begun():
        pass
    kept = load_job(RunFolder(tmp_path / "r").job_file)
    assert differences(kept, job) == [] and C in job_yaml(job)
    again = Life(job, "run", Quiet())
    with again.held():
        assert again.finished
    with pytest.raises(CorpusError, match="a secret was taken out"):
        list_files(kept.corpus.sources["s0"])
    with pytest.raises(JobError, match="a secret was taken out"):
        check_trackers(kept)
    other = Source(path=CANARIES[0].replace(C, "other"))
    sources = {**job.corpus.sources, "s0": job.corpus.sources["s0"].model_copy(update={"path": other.path})}
    corpus = job.corpus.model_copy(update={"sources": sources})
    assert differences(kept, job.model_copy(update={"corpus": corpus})) == []


def test_a_traceback_of_the_command_shows_none(tmp_path: Path) -> None:
    code = f"from raydist import cli\ndef fail(**_): raise OSError({CANARIES[0]!r})\n" + (
        "cli.group.commands['ls'].callback = fail\ncli.main(['ls'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and "OSError: https://***@host" in result.stderr
    assert C not in result.stdout + result.stderr


def test_autotrains_parameters_show_none() -> None:
    assert C not in str(LLMTrainingParams(token=C, data_path=CANARIES[0]).to_json())


def test_a_librarys_own_error_about_a_uri_is_one_of_the_corpus() -> None:
    with pytest.raises(CorpusError, match="cannot list") as refused:
        list_files(Source(path=f"hf://datasets/x:hf_{C}abcdefgh/y.jsonl"))
    assert C not in str(refused.value)
