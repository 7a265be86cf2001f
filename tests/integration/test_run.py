"""Whole runs by the command line: from raw files to a model, killed, resumed, stopped, refused."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

import raydist
from raydist import files
from raydist.cli import main
from raydist.cluster import remote
from raydist.errors import RunError
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.run.lifecycle import began_with
from raydist.track.records import effective
from raydist.training.checkpoint import newest_valid
from tests.chaos.chaos import ending, wait_for_moment
from tests.chaos.processes import Submission
from tests.trackers import read_tensorboard, read_wandb
from tests.whole_run import (
    STEPS,
    finish,
    folder_of,
    kill_everything,
    losses,
    reached,
    start,
    wait_for_step,
    written,
)

Here = Callable[..., tuple[int, str]]
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def job(whole: dict[str, Any]) -> dict[str, Any]:
    return whole


@pytest.fixture
def here(ray_local: None, capfd: pytest.CaptureFixture[str]) -> Here:
    """`submit` without a process and a Ray of its own: here(job, *arguments) -> (exit status, output)."""

    def submit_here(job: dict[str, Any], *arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["submit", written(job), *arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, "".join(capfd.readouterr())

    return submit_here


def test_a_run_from_raw_files_to_a_model(undisturbed: tuple[RunFolder, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, output = undisturbed
    assert "no cluster configured" in output and "held-out perplexity  words:" in output
    (time,) = re.findall(r"^time  (.*)$", output, re.MULTILINE)
    phases = "plan prepare start imports load first_step steps evaluation checkpoint export"
    assert re.sub(r" [\d.,]+ s", "", time).replace(" ", "_").split(",_") == phases.split()
    assert folder.status()["state"] == "finished"
    modes = {
        path.stat().st_mode & 0o777
        for path in folder.path.rglob("*")
        if path.is_file() and "wandb" not in path.parts
    }
    assert modes == {folder.path.stat().st_mode & 0o666}
    evaluations = [r for r in effective(folder) if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 20, STEPS]
    assert evaluations[-1]["perplexity"] < 0.5 * evaluations[0]["perplexity"]
    audit = folder.data()["audit"]
    assert audit["n_in"] == audit["n_trained"] + audit["n_held_out"] + audit["n_left"]
    assert audit["n_trained"] > 0 and audit["n_held_out"] > 0
    ledger = files.read_jsonl(folder.ledger_file)
    assert sum(line["tokens"] for line in ledger) == audit["n_trained"] + audit["n_repeated"]
    assert "<svg" in folder.report.read_text() and "http://" not in folder.report.read_text().split("<svg")[0]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder.model),
        AutoTokenizer.from_pretrained(folder.model),
    )
    logits = model(torch.tensor([tokenizer.encode("the quick brown")])).logits
    assert torch.isfinite(logits).all() and model.dtype == torch.float32


def test_show_prints_what_a_step_saw(undisturbed: tuple[RunFolder, str], command: Command) -> None:
    run, _ = undisturbed
    code, printed = command("show", str(run.path), "--step", "2")
    assert code == 0 and "text.jsonl, row " in printed
    samples = orjson.loads(command("show", str(run.path), "--step", "2", "--json")[1])
    text = (Path(began_with(run).corpus.sources["words"].path)).read_text()  # type: ignore[arg-type]
    rows = [orjson.loads(line)["text"] for line in text.splitlines()]
    pieces = [piece for sample in samples for piece in sample["pieces"]]
    whole = [p for p in pieces if not p["skipped"] and not p["rest"]]
    assert whole and {p["source"] for p in pieces} == {"words"}
    for piece in whole:
        assert any(row.startswith(piece["text"][:20]) for row in rows) and piece["text"][:20] in printed
    assert command("show", str(run.path), "--step", str(STEPS + 1))[0] == RunError.exit_code


def test_trackers_have_the_run(undisturbed: tuple[RunFolder, str]) -> None:
    import mlflow

    folder, _ = undisturbed
    client = mlflow.MlflowClient(f"sqlite:///{folder.path.parent.resolve()}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED" and run.data.params["train.lr"] == "0.003"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == STEPS
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"raydist-job.yaml", "report.html"}
    perplexity = run.data.metrics["eval/words/perplexity"]
    for points in (read_tensorboard(folder.path), read_wandb(folder.path)[0]):
        assert [step for step, _ in points["loss"]] == list(range(1, STEPS + 1))
        assert points["eval/words/perplexity"][-1] == (STEPS, pytest.approx(perplexity))


def test_a_finished_run_says_so_and_a_changed_job_is_refused(
    job: dict[str, Any], undisturbed: tuple[RunFolder, str], here: Here, command: Command
) -> None:
    code, output = here(job)
    assert code == 0 and "is finished already" in output
    code, output = command("resume", job["name"], "--storage", job["storage"])
    assert code == 0 and "is finished already" in output
    result = raydist.train(build_job(job))
    assert result.state == "finished" and result.metrics["words"]["step"] == STEPS
    assert sum(p.numel() for p in result.load_model().parameters()) > 100_000
    code, output = here(job, "--set", "train.lr=1e-3")
    assert code == 6 and "train.lr: 0.003 -> 0.001" in output and "new name" in output
    assert undisturbed[0].status()["state"] == "finished"


def test_killed_it_ends_bit_identical(
    job: dict[str, Any], undisturbed: tuple[RunFolder, str], here: Here
) -> None:
    """The short form of `make chaos`: SIGKILL of a worker, then of the driver, each at a random moment."""
    job = {**job, "name": "killed"}
    command, log = (
        [sys.executable, "-m", "raydist", "submit", written(job)],
        Path(job["storage"], "killed.log"),
    )
    submission, folder = Submission(command, log), folder_of(job)
    submission.start()
    assert wait_for_moment("train", submission, folder, random.Random(2)), submission.output
    assert submission.kill("worker")  # the run goes on by itself
    while not reached(folder, STEPS // 2, attempt=2):
        assert not submission.ended, submission.output
        time.sleep(0.02)
    assert submission.kill("driver") and folder.status()["state"] == "training"
    code, output = here(job)  # the killed driver's workers live on a little, and may commit once more
    assert code == 0, output
    begun = [r for r in files.read_jsonl(folder.metrics_file) if r["kind"] in ("start", "resume")]
    assert [record["attempt"] for record in begun] == [1, 2, 3]
    assert ending(folder) == ending(undisturbed[0])


def stop_after(step: int, job: dict[str, Any], number: signal.Signals) -> None:
    process, folder = start(job), folder_of(job)
    wait_for_step(folder, step, process)
    process.send_signal(number)
    check_stopped(folder, *finish(process))


def check_stopped(folder: RunFolder, code: int, output: str) -> None:
    assert code == 130 and "submit the job again" in output, output
    assert folder.status()["state"] == "stopped" and folder.report.exists()
    found = newest_valid(folder)
    assert found is not None and found.step == max(losses(folder))


def command_after(step: int, folder: RunFolder, attempt: int) -> None:
    """`raydist stop`, by a process of its own, once `step` of `attempt` is done."""

    def stop() -> None:
        while not reached(folder, step, attempt):
            time.sleep(0.02)
        subprocess.run([sys.executable, "-m", "raydist", "stop", str(folder.path)], check=True)

    threading.Thread(target=stop, daemon=True).start()


def test_stopped_and_resumed_with_one_worker_sees_the_same_batches(
    job: dict[str, Any], undisturbed: tuple[RunFolder, str], here: Here
) -> None:
    job = {**job, "name": "fewer"}
    folder = folder_of(job)
    command_after(12, folder, attempt=1)
    check_stopped(folder, *here(job))
    code, output = here(job, "--set", "scaling.num_workers=1")
    assert code == 0, output
    (resumed,) = (r for r in files.read_jsonl(folder.metrics_file) if r["kind"] == "resume")
    assert resumed["step"] >= 12 and resumed["world_size"] == 1
    assert losses(folder) == pytest.approx(losses(undisturbed[0]), rel=1e-4)
    assert folder.data()["audit"] == undisturbed[0].data()["audit"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_a_checkpoint(number: signal.Signals, job: dict[str, Any]) -> None:
    stop_after(5, {**job, "name": f"signal-{number}"}, number)


def test_a_workers_exception_arrives_with_its_traceback(job: dict[str, Any], here: Here) -> None:
    """A learning rate beyond fp32's range makes the loss infinite: training must say so, not go on."""
    job = {
        **job,
        "name": "diverges",
        "train": {**job["train"], "lr": 1e30, "max_steps": 8, "warmup_ratio": 0.0},
        "scaling": {"num_workers": 1},
    }
    code, output = here(job)
    assert code == 7 and "step 2: the gradient norm is nan" in output, output
    status = folder_of(job).status()
    assert status["state"] == "failed" and "step" in status["error"]


@pytest.mark.slow
def test_submit_through_the_jobs_api(
    job: dict[str, Any], undisturbed: tuple[RunFolder, str], head: str, here: Here
) -> None:
    job = {
        **job,
        "name": "by-jobs-api",
        "train": {**job["train"], "max_steps": 5},
        "scaling": {"num_workers": 1},
        "checkpoint": {"save_steps": 5},
    }
    code, output = here(job, "--address", head)
    assert code == 0, output
    assert "held-out perplexity" in output and folder_of(job).status()["state"] == "finished"


def test_a_refusal_on_the_cluster_is_told_here(job: dict[str, Any], head: str, here: Here) -> None:
    code, output = here({**job, "name": "refused", "packing": {"block_size": 4096}}, "--address", head)
    assert code == 2 and "max_position_embeddings" in output, output


def test_a_job_on_a_cluster_is_left_found_and_stopped(
    job: dict[str, Any], undisturbed: tuple[RunFolder, str], head: str, here: Here, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its storage is a relative path, so that it must be known again by the absolute one."""
    folder = folder_of({**job, "name": "left"})
    monkeypatch.chdir(folder.path.parent.parent)
    long = {"max_steps": 100_000, "global_batch_size": 16}
    job = {**job, "name": "left", "storage": folder.path.parent.name, "train": {**job["train"], **long}}
    job["scaling"] = {"num_workers": 1}
    monkeypatch.setattr(remote, "LOST_SECONDS", 1.0)
    client = remote.connect(head)
    told = "lost contact with the cluster"
    with Proxy(head) as proxy:
        proxy.refuse_once(lambda: any(each.status.name == "RUNNING" for each in client.list_jobs()))
        code, output = here(job, "--address", proxy.address)
    assert code == 8 and told in output and "only checked" in output, output
    with pytest.raises(RunError):
        remote.find_job(client, "left")
    with Proxy(head) as proxy:
        proxy.refuse_once(folder.path.exists)
        code, output = here(job, "--address", proxy.address)
    assert code == 8 and told in output and "the job may go on" in output, output
    with Proxy(head) as proxy:
        process = start(job, "--address", proxy.address)
        for step in (2, 4, 6):
            wait_for_step(folder, step, process)
            proxy.cut()
        wait_for_step(folder, 12, process)
        lines: list[str] = []
        reader = threading.Thread(target=lambda: [lines.append(line) for line in process.stdout or ()])
        reader.start()
        while sum(line.startswith("step") for line in lines) < 12:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = process.wait(240)
        reader.join()
        attached = "".join(lines)
    assert code == 0 and "detached; the job goes on" in attached, attached
    assert job_id(attached) == job_id(output)
    steps = [int(n) for n in re.findall(r"^step +([0-9,]+)/", attached, re.MULTILINE)]
    assert len(steps) > 10 and steps == list(range(1, len(steps) + 1)), attached
    code, output = command("status", "left", "--address", head)
    assert code == 0 and "left: running since" in output and str(folder.path.parent) in output
    assert command("stop", "left", "--address", head)[0] == 0
    code, output = command("logs", "left", "--follow", "--address", head)
    assert code == 130 and "run left was stopped" in output, output
    found = newest_valid(folder)
    assert found is not None and found.step == max(losses(folder)) and folder.state() == "stopped"
    assert re.search("^left +(stopped|failed) ", command("ls", "--address", head)[1], re.MULTILINE)
    code, output = command("stop", "left", "--address", head)
    assert code == 6 and "is not running" in output
    assert command("status", "nothing", "--address", head)[0] == 6


def job_id(output: str) -> str:
    found = re.search(r"^job (raydist-\S+) on", output, re.MULTILINE)
    assert found, output
    return found.group(1)


def test_who_may_not_in_is_told_why(head: str, tmp_path: Path) -> None:
    """No token, a wrong token, nobody there: three different errors. Ray keeps a token for good, so that
    each needs a process of its own."""
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    told = {
        "this machine has no token for the cluster": asked(head, HOME=str(tmp_path)),
        "does not accept the token": asked(head, RAY_AUTH_TOKEN="0123456789abcdef" * 4),
        f"no Ray cluster answers at {nobody}": asked(nobody),
    }
    for message, process in told.items():
        code, output = finish(process)
        assert code == 8 and message in output and "Traceback" not in output, output
        assert "0123456789abcdef" not in output


def asked(address: str, **environment: str) -> subprocess.Popen[str]:
    """RAY_ADDRESS, which Ray would follow, does not win over what was asked."""
    return subprocess.Popen(
        [sys.executable, "-m", "raydist", "ls", "--address", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_ADDRESS": "http://127.0.0.1:1", **environment},
    )


class Proxy:
    """A way to `target` that can be cut (connections break) and closed (no new ones are made)."""

    def __init__(self, target: str) -> None:
        self.target = int(target.rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.refuse()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self.open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for each in self.open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.open.clear()

    def refuse_once(self, true: Callable[[], bool]) -> None:
        def wait() -> None:
            while not true():
                time.sleep(0.1)
            self.refuse()

        threading.Thread(target=wait, daemon=True).start()

    def refuse(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A cluster of one node, behind a token, in processes of its own, beside whatever Ray there is."""
    port, dashboard, agent = free_ports(3)
    ray = Path(sys.executable).parent / "ray"
    command = [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--object-store-memory=268435456"]
    path = f"{ray.parent}:{os.environ['PATH']}"  # where the cluster finds its python
    silent = subprocess.DEVNULL
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": folder, "PATH": path}
        process = subprocess.Popen(command, stdout=silent, stderr=silent, env=environment)
        wait_for_port(dashboard, process)
        yield f"http://127.0.0.1:{dashboard}"
        kill_everything(process)
        process.wait()


def wait_for_port(port: int, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port}")


def test_losses_equal_those_of_a_plain_loop(job: dict[str, Any], undisturbed: tuple[RunFolder, str]) -> None:
    """Two workers under Ray against ten lines of PyTorch over the same blocks, transformers' attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from raydist.training.schedule import learning_rate

    folder, settings = undisturbed[0], raydist.load_job(undisturbed[0].job_file).train
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**job["model"]["config"], vocab_size=len(tokenizer), **special)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=settings.weight_decay)
    expected = {}
    feed = raydist.open_feed(folder.path)
    for index, step in enumerate(feed.loader(0, 1, 0, 20 * 16, global_batch_size=16, micro_batch_size=16)):
        (batch,) = step.micro_batches
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(index, STEPS, settings)
        optimizer.step()
        optimizer.zero_grad()
        expected[index + 1] = loss.item()
    recorded = losses(folder)
    assert {step: recorded[step] for step in expected} == pytest.approx(expected, rel=1e-5)
