"""Files of a run that were altered: it ends in the undisturbed weights, or is refused by the file's name."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pandas as pd
import pytest
from click.testing import CliRunner

from raydist.cli import group
from raydist.corpus import build, pipeline, slices
from raydist.corpus.build import LogPlan, build_log, plan_log
from raydist.corpus.log import open_log
from raydist.corpus.tokenizer import pretrained_tokenizer
from raydist.errors import CheckpointError, CorpusError, LogError, RaydistError, Stopped
from raydist.folder import RunFolder
from raydist.job.plan import make_plan
from raydist.job.schema import Job, TrainSource
from raydist.run.attempts import attempt_spec
from raydist.run.dataset import find_prepared
from raydist.run.lifecycle import Life
from raydist.run.verify import verify_log, verify_run
from raydist.storage import Storage
from raydist.track.listener import Listener
from raydist.training.hooks import StopOnRequest
from raydist.training.loop import train
from tests.train_parts import make_job, write_tokenizer
from tests.weights import weight_hash


def make_log(plan: LogPlan) -> None:
    """The slices that are missing or damaged, as tasks make them on Ray, but in this process."""
    assert plan.tokenizer is not None
    sink = pipeline.LogDatasink(plan.folder, fail_on_bad=True)
    for number in build._Slices(plan, verify=True).missing:
        parts, options = pipeline.narrowed(plan.source.files, plan.slices[number]), plan.source.options
        chunks = pipeline.read_blocks(number, *parts, options)
        sink.write([pipeline.tokenize(chunk, plan.tokenizer, "tokenizers", (), {}) for chunk in chunks], None)  # type: ignore[arg-type]
    build_log(plan, on_error="fail")


def planned(job: Job) -> LogPlan:
    tokenizer = pretrained_tokenizer(str(job.model.tokenizer))
    return plan_log(job.corpus.sources["random"], job.corpus, tokenizer, Storage(job.storage).tokens)


def go_on(job: Job, stop_after: int | None = None) -> RunFolder:
    """A run without Ray: its folder claimed, its logs found, and trained in this process."""
    life = Life(job, "run", Listener())
    with life.held(), life.begun():
        folder = life.folder
        prepared = find_prepared(job, folder.data().get("pins"))
        folder.add_data(pins=prepared.pins())
        number = folder.next_attempt()
        folder.attempt(number).mkdir(parents=True)
        life.training()
        asked = itertools.count(1)  # at the start, and after each step
        stop = StopOnRequest(lambda: stop_after is not None and next(asked) >= stop_after)
        if train(attempt_spec(prepared, folder, make_plan(job, 1, None), number), hooks=[stop]).stopped:
            raise life.stopped()
    return folder


@dataclass(frozen=True)
class Half:
    """A run stopped at step 4 of 6, with checkpoints of steps 2 and 4. weights: what it would end in."""

    job: Job
    weights: str

    def copied(self, to: Path) -> Job:
        shutil.copytree(self.job.storage, to)
        return self.job.model_copy(update={"storage": str(to)})


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    place = tmp_path_factory.mktemp("half")
    write_tokenizer(place / "words")
    lines = (" ".join(f"w{2 + (i * 7 + j * (i % 5 + 1)) % 60}" for j in range(5 + i % 20)) for i in range(80))
    (place / "random.txt").write_text("\n".join(lines) + "\n")
    job = make_job(
        place / "runs",
        model={"tokenizer": str(place / "words")},
        corpus={"sources": {"random": {"path": str(place / "random.txt")}}, "slice_bytes": 2048},
        train={"max_steps": 6},
        checkpoint={"save_steps": 2},
        eval={"eval_steps": 3},
    )
    make_log(planned(job))
    folder = go_on(job)
    weights = weight_hash(folder.model)
    shutil.rmtree(folder.path)
    with pytest.raises(Stopped):
        go_on(job, stop_after=4)
    assert folder.committed_steps() == [2, 4] and not folder.model.exists()
    return Half(job, weights)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: flipped(content, len(content) // 2),
    "foreign": lambda content: b'{"name": "something else", "version": 3}\n',
    "binary": lambda content: bytes(range(256)) * 8,
}


def flipped(content: bytes, at: int) -> bytes:
    """One bit; in text, of a character that counts."""
    while not chr(content[at]).isalnum() and at + 1 < len(content):
        at += 1
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


RUN = ("raydist-job.yaml", "status.json", "data.json", "metrics.jsonl", "ledger.jsonl", ".raydist")
CHECKPOINT = ("checkpoints/step-00000004/COMMIT.json", "checkpoints/step-00000004/*.safetensors")
TOKENS = ("manifest.json", "plan.json", "slices/00000.json", "shards/00000-000.arrow")
FILES = [f"run/{name}" for name in (*RUN, *CHECKPOINT)] + [f"tokens/*/{name}" for name in TOKENS]
FILES += [".packs/*-*/00000-000.pack"]
QUICK = [FILES[place] for place in (0, 2, 5, 6, 8, 11)]
PREPARE_MAKES = ("plan.json", "00000.json")
"""What training does not read, and so does not put right."""


def found(storage: str, pattern: str) -> Path:
    return next(iter(sorted(Path(storage).glob(pattern))))


def refusal(job: Job) -> RaydistError | None:
    """What the run is refused with, if it does not go on to its end."""
    try:
        go_on(job)
    except RaydistError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_changes_nothing_or_is_refused_by_its_name(
    tmp_path: Path, half: Half, name: str, damage: str
) -> None:
    job = half.copied(tmp_path / "runs")
    file, run = found(job.storage, name), RunFolder(tmp_path / "runs" / "run")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    told = "\n".join(map(str, verify_run(run).damage))
    assert file.name in told or file == run.metrics_file, told
    refused = refusal(job)
    if refused is not None:
        assert file.name in str(refused) and refused.fix, refused
    else:
        assert weight_hash(run.model) == half.weights and run.state() == "finished"
        left = "\n".join(map(str, verify_run(run).damage))
        assert file.name not in left or file == run.metrics_file or file.name in PREPARE_MAKES, left


@pytest.mark.parametrize("name", QUICK)
def test_one_altered_bit_changes_nothing_or_is_refused_by_its_name(
    tmp_path: Path, half: Half, name: str
) -> None:
    test_a_damaged_file_changes_nothing_or_is_refused_by_its_name(tmp_path, half, name, "flipped")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", TOKENS)
def test_a_damaged_token_log_is_made_again(tmp_path: Path, half: Half, name: str, damage: str) -> None:
    job = half.copied(tmp_path / "runs")
    plan = planned(job)
    file = found(job.storage, f"tokens/*/{name}")
    before = file.read_bytes()
    file.write_bytes(DAMAGES[damage](before))
    assert [error for error in verify_log(plan.path).damage if file.name in str(error) and error.fix]
    make_log(planned(job))
    assert file.read_bytes() == before and not verify_log(plan.path).damage


def write_again(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"w3", b"w4"))


def append(path: Path) -> None:
    with path.open("a") as stream:
        stream.write("w5 w6\n")


def change_and_change_back(path: Path) -> None:
    before = path.read_bytes()
    write_again(path)
    path.write_bytes(before)


@pytest.mark.parametrize("change", [write_again, append, change_and_change_back])
def test_a_slice_of_a_file_that_changes_meanwhile_is_not_committed(
    tmp_path: Path, half: Half, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "random.txt"
    shutil.copy2(str(half.job.corpus.sources["random"].path), file)
    corpus = half.job.corpus.model_copy(update={"sources": {"random": TrainSource(path=str(file))}})
    plan = planned(half.job.model_copy(update={"storage": str(tmp_path / "runs"), "corpus": corpus}))
    before, sink = file.read_bytes(), pipeline.LogDatasink(plan.folder, fail_on_bad=True)
    assert plan.tokenizer is not None

    def blocks() -> Iterator[pd.DataFrame]:
        parts = pipeline.narrowed(plan.source.files, plan.slices[0])
        for chunk in pipeline.read_blocks(0, *parts, plan.source.options):
            change(file)
            yield pipeline.tokenize(chunk, plan.tokenizer, "tokenizers", (), {})

    with pytest.raises(CorpusError, match=r"random\.txt changed while it was read"):
        sink.write(blocks(), None)  # type: ignore[arg-type]
    assert not plan.folder.committed()
    with (
        pytest.raises(CorpusError, match="changed while it was read")
        if file.read_bytes() != before
        else nullcontext()
    ):
        make_log(plan)


def test_a_file_that_changes_while_it_is_cut_is_not_planned(
    tmp_path: Path, half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "random.txt"
    shutil.copy2(str(half.job.corpus.sources["random"].path), file)
    source = replace(
        planned(half.job).source, files=(replace(planned(half.job).source.files[0], location=str(file)),)
    )
    cut = slices.cut_file

    def changed_meanwhile(*arguments: Any) -> Any:
        write_again(file)
        return cut(*arguments)

    assert source.plan()
    monkeypatch.setattr(slices, "cut_file", changed_meanwhile)
    with pytest.raises(CorpusError, match="changed while it was read"):
        source.plan()


def test_training_ends_before_it_commits_what_it_read_of_a_damaged_shard(tmp_path: Path, half: Half) -> None:
    job = half.copied(tmp_path / "runs")
    shard = found(job.storage, "tokens/*/shards/00000-000.arrow")
    content = bytearray(shard.read_bytes())
    tokens = open_log(shard.parent.parent).shards[0].tokens().tobytes()
    at = bytes(content).index(tokens)
    content[at : at + len(tokens) : 40] = bytes(b ^ 1 for b in content[at : at + len(tokens) : 40])
    shard.write_bytes(content)
    with pytest.raises(LogError, match=r"the shard 00000-000\.arrow of the token log is damaged") as refused:
        go_on(job)
    assert refused.value.where == str(shard) and "raydist prepare" in refused.value.fix
    run = RunFolder(tmp_path / "runs" / "run")
    assert run.committed_steps() == [2, 4] and run.state() == "failed"
    make_log(planned(job))
    assert weight_hash(go_on(job).model) == half.weights


def test_verify_says_what_it_read_and_what_is_damaged(tmp_path: Path, half: Half) -> None:
    job = half.copied(tmp_path / "runs")
    run = str(tmp_path / "runs" / "run")
    whole = CliRunner().invoke(group, ["verify", run])
    assert whole.exit_code == 0 and "all as they were written" in whole.stdout and "token log" in whole.stderr
    shard = found(job.storage, "tokens/*/shards/00000-000.arrow")
    shard.write_bytes(flipped(shard.read_bytes(), 2000))
    log = str(shard.parent.parent)
    for place in (run, log):
        found_out = CliRunner().invoke(group, ["verify", place])
        assert found_out.exit_code == LogError.exit_code
        assert f"where: {shard}" in found_out.stdout and "raydist prepare" in found_out.stdout
    told = orjson.loads(CliRunner().invoke(group, ["verify", log, "--json"]).stdout)
    assert [damage["where"] for damage in told["damage"]] == [str(shard)] and told["bytes"] > 2000
    (Path(run) / "checkpoints/step-00000004/COMMIT.json").write_text("{")
    found_out = CliRunner().invoke(group, ["verify", run])
    assert found_out.exit_code == CheckpointError.exit_code and "2 damaged" in found_out.stdout


def test_verify_takes_files_that_a_folder_holds_and_a_log_leaves_out_for_no_damage(
    tmp_path: Path, half: Half
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy2(str(half.job.corpus.sources["random"].path), folder / "random.txt")
    for name in ("_SUCCESS", ".hidden.txt"):
        (folder / name).write_text("w2 w3\n")
    corpus = {"sources": {"random": {"path": str(folder)}}, "slice_bytes": 2048}
    job = make_job(tmp_path / "runs", model={"tokenizer": str(half.job.model.tokenizer)}, corpus=corpus)
    plan = planned(job)
    make_log(plan)
    assert plan.folder.read_manifest()["left_out"]
    assert verify_log(plan.path).damage == []


def test_an_altered_model_is_named(tmp_path: Path, half: Half) -> None:
    folder = go_on(half.copied(tmp_path / "runs"))
    assert verify_run(folder).damage == []
    weights, config = folder.model / "model.safetensors", folder.model / "config.json"
    weights.write_bytes(flipped(weights.read_bytes(), weights.stat().st_size - 100))
    config.unlink()
    (folder.model / "README.md").write_text("Changed by its owner.")
    told = [f"{error.what} {error.where}" for error in verify_run(folder).damage]
    assert sorted(told) == [
        f"model/config.json is missing {config}",
        f"model/model.safetensors is not what was exported {weights}",
    ]
    shutil.rmtree(folder.model)
    assert verify_run(folder).damage == []


def test_damaged_runs_are_listed_among_the_others(tmp_path: Path, half: Half) -> None:
    storage = Path(half.copied(tmp_path / "runs").storage)
    for damage in DAMAGES:
        shutil.copytree(storage / "run", storage / damage)
        for name in ("status.json", "metrics.jsonl", "data.json", "raydist-job.yaml", "ledger.jsonl"):
            file = storage / damage / name
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
    listed = CliRunner().invoke(group, ["ls", "--storage", str(storage)])
    assert listed.exit_code == 0, listed.output
    states = {line.split()[0]: line.split()[1] for line in listed.output.splitlines()[1:]}
    assert states == {"run": "stopped", **dict.fromkeys(DAMAGES, "damaged")}
    for damage in DAMAGES:
        told = CliRunner().invoke(group, ["status", damage, "--storage", str(storage)])
        assert told.exit_code == 0 and "status.json is damaged" in told.output and "resume" in told.output
        logs = CliRunner().invoke(group, ["logs", damage, "--storage", str(storage)])
        assert isinstance(logs.exception, RaydistError) and "status.json is damaged" in logs.exception.why
