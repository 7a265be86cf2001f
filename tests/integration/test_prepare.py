"""Preparing a token log on a real Ray: content, order, resumption, damage, and what bad input says."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import ray
import xxhash

from raydist.corpus import build, pipeline
from raydist.corpus.build import LogPlan, Progress, build_log, estimate, plan_log
from raydist.corpus.formats import Part, ReadOptions
from raydist.corpus.locations import File
from raydist.corpus.log import SliceWriter, TokenLog
from raydist.corpus.log_folder import LogFolder
from raydist.corpus.slices import MAX_PARTS, Slice
from raydist.corpus.source import SourceFiles
from raydist.corpus.tokenizer import Reference, TokenizerSpec, open_tokenizer, train_tokenizer
from raydist.errors import BadRecords, ClusterError, CorpusError, EmptyCorpus, LogError
from raydist.files import read_json
from raydist.job.schema import Corpus, TrainSource

DAMAGED = Path(__file__).parents[1] / "unit/corpus/damaged"
WORDS = [
    "the",
    "of",
    "and",
    "数",
    "naïve",
    "a",
    "page",
    "number",
    "théâtre",
    "where",
    "<|endoftext|>",
    "it's",
]


def text_of(i: int) -> str:
    rng = random.Random(i)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 400)))


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSpec:
    folder = train_tokenizer(map(text_of, range(50)), 320, tmp_path_factory.mktemp("tokenizer"))
    return open_tokenizer(folder).spec


@pytest.fixture
def planned(tmp_path: Path, spec: TokenizerSpec) -> Any:
    """plan(slice_bytes=..., clean=..., **source): the log of the folder `files` in `tmp_path`."""

    def plan(slice_bytes: int = 2**20, clean: Any = (), tokens: str = "tokens", **source: Any) -> LogPlan:
        whole = TrainSource.model_validate({"path": str(tmp_path / "files"), **source})
        corpus = Corpus(sources={"a": whole}, slice_bytes=slice_bytes, clean=list(clean))
        return plan_log(whole, corpus, spec, tmp_path / tokens)

    return plan


def content(log: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(p.relative_to(log)): p.read_bytes() for p in sorted(log.rglob("*")) if p.is_file()}


def texts_by_hash(texts: list[str]) -> dict[bytes, str]:
    return {xxhash.xxh3_128_digest(text.encode()): text for text in texts}


@pytest.mark.usefixtures("ray_local")
class TestOnRay:
    def test_the_log_holds_every_document_once_as_the_reference_encodes_it(
        self, tmp_path: Path, planned: Any, spec: TokenizerSpec
    ) -> None:
        texts = [text_of(i) for i in range(300)]
        write_lines(tmp_path / "files/a.jsonl", texts[:200])
        write_lines(tmp_path / "files/sub/b.jsonl", texts[200:])
        plan = planned(slice_bytes=40_000)
        assert plan.n_slices > 5 and plan.n_files == 2 and not plan.complete
        seen: list[Progress] = []
        log = build_log(plan, on_error="fail", on_progress=seen.append)
        by_hash, reference = texts_by_hash(texts), Reference(spec)
        documents = list(log.documents())
        assert sorted(by_hash[d["hash"]] for d in documents) == sorted(texts)
        for document in documents:
            text = by_hash[document["hash"]]
            np.testing.assert_array_equal(document["input_ids"], reference.encode_batch([text])[0])
            assert document["n_bytes"] == len(text.encode())
            assert document["file"] in ("a.jsonl", "sub/b.jsonl")
        assert log.n_bytes == sum(len(text.encode()) for text in texts)
        assert seen[-1] == Progress(plan.n_slices, plan.n_slices, 300, log.n_tokens, log.n_bytes)
        assert log.fingerprint == plan.fingerprint == log.path.name and plan.complete
        self.check_tidy(log, plan)

    def check_tidy(self, log: TokenLog, plan: LogPlan) -> None:
        """The folder has the named files only, and a second build touches none."""
        names = {"plan.json", "manifest.json", *(f"shards/{shard.name}" for shard in log.shards)}
        names |= {f"slices/{number:05d}.json" for number in range(plan.n_slices)}
        assert content(log.path).keys() == names
        times = {path: path.stat().st_mtime_ns for path in log.path.rglob("*")}
        assert build_log(plan, on_error="fail") == log
        assert times == {path: path.stat().st_mtime_ns for path in log.path.rglob("*")}

    @pytest.mark.parametrize("n_slices", [1, 2, 3])
    def test_reading_tokenizing_and_writing_are_one_task(
        self, tmp_path: Path, planned: Any, spec: TokenizerSpec, n_slices: int
    ) -> None:
        for i in range(n_slices):
            write_lines(tmp_path / f"files/{i}.jsonl", [text_of(i)] * 30)
        plan = planned(slice_bytes=1024)
        slices = dict(enumerate(plan.slices[:n_slices]))
        with pipeline.settings():
            dataset = pipeline.dataset(plan.source, slices, spec, "fastokens")
            sink = pipeline.LogDatasink(LogFolder(tmp_path / "log"), fail_on_bad=True)
            dataset.write_datasink(sink, ray_remote_args=pipeline.REMOTE)
            stats = dataset._write_ds.stats()
        assert f"ReadSlice->MapBatches(tokenize)->Write: {n_slices} tasks executed" in stats
        assert "Operator 2" not in stats

    def test_a_lost_shard_is_made_again_alone(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(100)])
        plan = planned(slice_bytes=30_000)
        log = build_log(plan, on_error="fail")
        before = content(log.path)
        times = {shard.name: shard.path.stat().st_mtime_ns for shard in log.shards}
        log.shards[1].path.unlink()
        log.shards[2].path.write_bytes(b"torn")
        (log.path / "shards/.00000-000.arrow.0123456789ab.tmp").write_bytes(b"left by a killed task")
        (log.path / "shards/00000-007.arrow").write_bytes(b"of no slice")
        users = {"notes.txt": b"mine", "shards/mine.arrow": b"mine"}
        for name, text in users.items():
            (log.path / name).write_bytes(text)
        build_log(plan, on_error="fail")
        assert content(log.path) == before | users
        new = {shard.name: shard.path.stat().st_mtime_ns for shard in log.shards}
        made = {name for name in times if new[name] != times[name]}
        assert made == {log.shards[1].name, log.shards[2].name}

    def test_a_shard_whose_bytes_were_altered_is_made_again_alone(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(100)])
        plan = planned(slice_bytes=30_000)
        log = build_log(plan, on_error="fail")
        before = content(log.path)
        times = {shard.name: shard.path.stat().st_mtime_ns for shard in log.shards}
        altered = bytearray(log.shards[1].path.read_bytes())
        altered[len(altered) // 3] ^= 4
        log.shards[1].path.write_bytes(altered)
        os.truncate(log.folder.commit_file(2), 40)
        build_log(planned(slice_bytes=30_000), on_error="fail", verify=True)
        assert content(log.path) == before
        new = {shard.name: shard.path.stat().st_mtime_ns for shard in log.shards}
        made = {name for name in times if new[name] != times[name]}
        assert made == {log.shards[1].name, log.shards[2].name}

    def test_bad_records_fail_or_are_set_aside(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/good.jsonl", [text_of(i) for i in range(20)])
        bad = b'{"text": "fine"}\n{"text": 5}\nnot json\n{"text": ""}\n'
        cut = b'{"text": "a line in one of several slices"}\n' * 100
        (tmp_path / "files/cut.jsonl").write_bytes(cut + b"{}\n")
        (tmp_path / "files/bad.jsonl").write_bytes(bad)
        plan = planned(slice_bytes=1024)
        with pytest.raises(BadRecords, match=r"records? or files cannot be read") as caught:
            build_log(plan, on_error="fail")
        assert re.search(r"bad.jsonl, byte 17: |cut.jsonl, byte 4400: ", caught.value.where)
        assert "quarantine" in caught.value.fix
        assert not plan.complete
        log = build_log(plan, on_error="quarantine")
        assert (log.n_documents, log.n_quarantined, log.n_empty) == (121, 3, 1)
        listed = [orjson.loads(line) for line in (log.path / "quarantine.jsonl").read_bytes().splitlines()]
        named = sorted((each["file"], each["byte"]) for each in listed)
        assert named == [("bad.jsonl", 17), ("bad.jsonl", 29), ("cut.jsonl", len(cut))]
        assert "row" not in listed[0]
        assert all(each["reason"] for each in listed)
        with pytest.raises(BadRecords, match="3 records"):
            build_log(plan, on_error="fail")

    def test_a_slice_that_could_not_be_read_is_read_again(self, tmp_path: Path, planned: Any) -> None:
        """By the version before, say: then its record is no reason to refuse the corpus for ever."""
        write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(9)])
        plan = planned()
        before = SliceWriter(plan.folder, 0, ["a.jsonl"])
        before.bad.append({"file": "a.jsonl", "byte": 0, "reason": "NaN"})
        before.commit()
        log = build_log(plan, on_error="fail")
        assert (log.n_documents, log.n_quarantined) == (9, 0)
        self.check_tidy(log, plan)

    def test_files_that_crash_their_decoder_fail_or_are_set_aside(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/good.jsonl", [text_of(i) for i in range(20)])
        for path in DAMAGED.iterdir():
            (tmp_path / "files" / path.name).write_bytes(path.read_bytes())
        plan = planned(slice_bytes=1024)
        with pytest.raises(BadRecords, match=r"records? or files cannot be read"):
            build_log(plan, on_error="fail")
        log = build_log(plan, on_error="quarantine")
        listed = [orjson.loads(line) for line in (log.path / "quarantine.jsonl").read_bytes().splitlines()]
        assert {each["file"] for each in listed} == {path.name for path in DAMAGED.iterdir()}
        crash = "the decoder crashed (signal SIGABRT) on it: the file is damaged"
        assert [each["reason"] for each in listed if each["file"] == "footer.parquet"] == [crash]
        assert log.n_quarantined == len(listed) and log.n_documents >= 20
        with pytest.raises(BadRecords, match=f"{len(listed)} records"):
            build_log(plan, on_error="fail")

    @pytest.mark.slow
    def test_a_cleaning_step_that_crashes_ends_with_an_error(
        self, tmp_path: Path, planned: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_lines(tmp_path / "files/a.jsonl", [*map(text_of, range(build.SAMPLE_TEXTS)), "crash"])
        step = "import os\n\ndef crash(text):\n    return os.abort() if text == 'crash' else text\n"
        (tmp_path / "crashing_step.py").write_text(step)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(CorpusError, match="lost its process 9 times"):
            build_log(planned(clean=["crashing_step:crash"]), on_error="quarantine")

    def test_cleaning_and_its_errors(
        self, tmp_path: Path, planned: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_lines(tmp_path / "files/a.jsonl", ["  two   words ", "one", "   "])
        log = build_log(planned(clean=["whitespace", {"min_words": {"count": 2}}]), on_error="fail")
        assert [d["hash"] for d in log.documents()] == [xxhash.xxh3_128_digest(b"two words")]
        assert log.n_empty == 2
        with pytest.raises(CorpusError) as caught:
            build_log(planned(clean=["string:capwords", "json:loads"]), on_error="fail")
        assert "a cleaning step failed" in caught.value.what and "a.jsonl, byte 0" in caught.value.where

    def test_nothing_to_train_on(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/a.jsonl", ["", ""])
        with pytest.raises(EmptyCorpus, match="no document is left") as caught:
            build_log(planned(), on_error="fail")
        assert "2 documents without text" in caught.value.why

    def test_a_cluster_without_a_free_cpu(
        self, tmp_path: Path, planned: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_lines(tmp_path / "files/a.jsonl", ["text"])
        monkeypatch.setattr(build, "CPU_PATIENCE_SECONDS", 0.5)
        total = ray.cluster_resources()["CPU"]
        group = ray.util.placement_group([{"CPU": total}])
        ray.get(group.ready())
        while ray.available_resources().get("CPU", 0):  # what is free is reported a moment later
            time.sleep(0.02)
        try:
            with pytest.raises(ClusterError, match=rf"0 of {total:g} CPUs"):
                build_log(planned(), on_error="fail")
        finally:
            ray.util.remove_placement_group(group)

    def test_an_estimate_is_near_and_a_finished_log_is_counted(self, tmp_path: Path, planned: Any) -> None:
        write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(400)])
        plan = planned(slice_bytes=100_000)
        guess = estimate(plan)
        log = build_log(plan, on_error="fail")
        exact = estimate(plan)
        assert (exact.n_documents, exact.n_tokens, exact.n_bytes) == (
            log.n_documents,
            log.n_tokens,
            log.n_bytes,
        )
        assert guess.n_tokens == pytest.approx(exact.n_tokens, rel=0.25) and guess != exact


def test_the_sink_empties_what_it_has_written(tmp_path: Path, planned: Any, spec: TokenizerSpec) -> None:
    """Ray keeps a task's blocks until it ends; the tokens of a file that cannot be split must not pile up."""
    write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(50)])
    source = planned().source
    tables = pipeline.read_blocks(0, source.files, source.plan()[0], source.options)
    blocks = [pipeline.tokenize(table, spec, "fastokens", (), {}) for table in tables]
    sizes = [sys.getsizeof(piece) for block in blocks for piece in block["piece"]]
    assert sum(sizes) > 10_000
    pipeline.LogDatasink(LogFolder(tmp_path / "log"), fail_on_bad=True).write(blocks, None)
    assert all(sys.getsizeof(piece) < 1000 for block in blocks for piece in block["piece"])
    (record,) = (read_json(path) for path in (tmp_path / "log/slices").iterdir())
    assert sum(shard["n_documents"] for shard in record["shards"]) == 50


def test_a_task_of_very_many_files_stays_small() -> None:
    """Ray warns of tasks of more than a MiB, and names their function."""
    files = []
    for i in range(MAX_PARTS):
        name, digest = f"{i // 1000:04}/{i}.txt", xxhash.xxh3_128_hexdigest(str(i).encode())
        files.append(File(name, f"/data/corpus/{name}", 50, digest, "text", None))
    slices = {0: Slice(tuple(Part(i) for i in range(MAX_PARTS)), 50 * MAX_PARTS)}
    source = SourceFiles(tuple(files), ReadOptions("auto", "text", "line"), (), 2**20)
    (task,) = pipeline.SliceDatasource(source, slices).get_read_tasks(1)
    assert task.read_fn.__name__ == "read_blocks" and len(pickle.dumps(task.read_fn)) < 2**20


def test_a_slice_cut_short_is_not_committed(tmp_path: Path, planned: Any, spec: TokenizerSpec) -> None:
    write_lines(tmp_path / "files/a.jsonl", [text_of(i) for i in range(50)])
    source = planned().source
    tables = list(pipeline.read_blocks(0, source.files, source.plan()[0], source.options))
    blocks = [pipeline.tokenize(table, spec, "fastokens", (), {}) for table in tables[:-1]]
    with pytest.raises(LogError, match="ended before its reader did"):
        pipeline.LogDatasink(LogFolder(tmp_path / "log"), fail_on_bad=True).write(blocks, None)
    assert not (tmp_path / "log/slices").exists()


def test_what_decides_the_fingerprint(tmp_path: Path, planned: Any, spec: TokenizerSpec) -> None:
    write_lines(tmp_path / "files/a.jsonl", ["text"])
    plan = planned()
    assert planned(tokens="elsewhere").fingerprint == plan.fingerprint
    changed = [planned(slice_bytes=2**19), planned(clean=["whitespace"]), planned(format="jsonl")]
    write_lines(tmp_path / "files/a.jsonl", ["another text"])
    changed.append(planned())
    assert len({each.fingerprint for each in [plan, *changed]}) == 5
    with pytest.raises(CorpusError, match="body") as caught:
        planned(text_column="body")
    assert "text" in caught.value.why


# --- killed at any instant


@dataclass(frozen=True)
class Scene:
    """Arguments of the program, which writes to `tokens`, and a log of the same files made in one go."""

    arguments: list[str]
    plan: LogPlan
    undisturbed: Path


@pytest.fixture
def scene(tmp_path: Path, planned: Any, spec: TokenizerSpec, ray_local: None) -> Scene:
    for i in range(6):
        write_lines(tmp_path / f"files/{i}.jsonl", [text_of(i * 1000 + j) for j in range(700)])
    whole = build_log(planned(slice_bytes=100_000, tokens="undisturbed"), on_error="fail")
    tokens = tmp_path / "tokens"
    arguments = [str(tmp_path / "files"), str(spec.folder), str(tokens), "100000"]
    return Scene(arguments, planned(slice_bytes=100_000), whole.path)


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("prepare_program.py"))
    path = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, program, *arguments], start_new_session=True, env=environment)


def n_committed(log: Path) -> int:
    return len(list(log.glob("slices/*.json")))


def kill_while_writing(scene: Scene, n_more: int, seconds: float) -> None:
    """SIGKILL the program and its Ray, `seconds` after it committed `n_more` slices."""
    target = n_committed(scene.plan.path) + n_more
    process = start(scene.arguments)
    while process.poll() is None and n_committed(scene.plan.path) < target:
        time.sleep(0.002)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not scene.plan.complete, "killed too late to show anything"


def check_same_after_kills(scene: Scene, n_kills: int) -> None:
    rng = random.Random(n_kills)
    for _ in range(n_kills):
        kill_while_writing(scene, rng.randint(1, scene.plan.n_slices // (n_kills + 2)), rng.random() * 0.05)
    n_done = n_committed(scene.plan.path)
    assert n_kills <= n_done < scene.plan.n_slices
    kept = {path: path.stat().st_mtime_ns for path in scene.plan.path.glob("slices/*.json")}
    log = build_log(scene.plan, on_error="fail")
    assert content(log.path) == content(scene.undisturbed)
    assert log.n_documents == 4200 and len(log.shards) == scene.plan.n_slices > 40
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "finished slices are not made again"


def test_killed_it_ends_byte_identical(scene: Scene) -> None:
    check_same_after_kills(scene, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_it_ends_byte_identical(scene: Scene) -> None:
    check_same_after_kills(scene, 10)
