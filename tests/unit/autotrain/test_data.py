"""Splits: of folders, of files, of the hub's data sets as parquet."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydist.autotrain.data import find_data
from raydist.errors import JobError
from tests.unit.autotrain.hub import Hub, running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        *("splits/train-0.jsonl", "splits/train_1.jsonl", "splits/trainer.jsonl", "splits/train.log"),
        *("splits/validation.jsonl", "plain/a.txt", "plain/valid/b.txt", "plain/.hidden.txt"),
        *("nested/train/deep/c.csv", "nested/test.csv", "own/valid.txt", "corpus.json"),
        *("clone/data/train-00000-of-00001.csv", "clone/data/test-00000-of-00001.csv", "clone/README.md"),
        *("deep/data/a.txt", "deep/data/valid.txt", "words/data/my-train.txt", "words/data/my-dev.txt"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("places", "train", "valid", "expected"),
    [
        ("corpus.json", "train", None, (["corpus.json"], [])),
        ("./corpus.json", "train", "own/valid.txt", (["./corpus.json"], ["own/valid.txt"])),
        ("corpus.json", "train", "own", (["corpus.json"], ["own"])),
        (["corpus.json", "plain/a.txt"], "train", None, (["corpus.json", "plain/a.txt"], [])),
        ("plain/*.txt", "train", None, (["plain/*.txt"], [])),
        ("s3://bucket/web", "train", "s3://bucket/valid", (["s3://bucket/web"], ["s3://bucket/valid"])),
        ("splits", "train", None, (["splits/train-0.jsonl", "splits/train_1.jsonl"], [])),
        (
            *("splits", "train", "validation"),
            (["splits/train-0.jsonl", "splits/train_1.jsonl"], ["splits/validation.jsonl"]),
        ),
        ("splits", "validation", None, (["splits/validation.jsonl"], [])),
        ("nested", "train", "test", (["nested/train"], ["nested/test.csv"])),
        ("clone", "train", "test", (["clone"], ["clone/data/test-00000-of-00001.csv"])),
        ("clone", "test", None, (["clone/data/test-00000-of-00001.csv"], [])),
        ("deep", "train", "validation", (["deep/data/a.txt"], ["deep/data/valid.txt"])),
        ("words", "train", "validation", (["words/data/my-train.txt"], ["words/data/my-dev.txt"])),
        ("plain", "train", None, (["plain"], [])),
        ("plain", "train", "valid", (["plain/a.txt"], ["plain/valid"])),
        (["plain", "nested"], "train", "test", (["plain", "nested/train"], ["nested/test.csv"])),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_split_is_found(
    places: str | list[str], train: str, valid: str | None, expected: tuple[list[str], list[str]]
) -> None:
    assert find_data(places, train, valid) == expected


@pytest.mark.parametrize(
    ("places", "train", "valid", "reason"),
    [
        ("gone.txt", "train", None, "no file or folder gone.txt"),
        ("gone", "train", None, "no file or folder gone"),
        ("corpus.json", "training", None, "nothing is named training in corpus.json"),
        ("splits", "other", None, "nothing is named other in splits"),
        ("plain", "train", "test", "nothing is named test in plain"),
        ("corpus.json", "train", "validation", "nothing is named validation in corpus.json"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_split_that_is_not_there_is_refused(
    places: str, train: str, valid: str | None, reason: str
) -> None:
    with pytest.raises(JobError) as told:
        find_data(places, train, valid)
    assert told.value.what == reason


# --- the hub

PROGRAM = """
import json, sys
from raydist.autotrain.data import find_data
from raydist.corpus.source import open_source
from raydist.errors import JobError
from raydist.job.schema import Corpus, Source

for asked in json.loads(sys.argv[1]):
    try:
        found = find_data(*asked)
        corpus = Corpus(sources={"x": {"path": "x"}})
        sources = [open_source(Source(path=paths), corpus) for paths in found if paths]
        print(json.dumps([found, [sorted(source.texts(source.plan())) for source in sources]]))
    except JobError as error:
        print(json.dumps(error.what + "; " + error.fix))
"""


def parquet(*texts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue()


def test_a_data_set_of_the_hub_is_read_from_its_parquet() -> None:
    """In a process of its own: the hub's address is read when its library is imported."""
    files = {
        "o/one/default/train/0000.parquet": parquet("a", "b"),
        "o/one/default/train/0001.parquet": parquet("c"),
        "o/one/default/validation/0000.parquet": parquet("v"),
        "o/two/de/train/0000.parquet": parquet("d"),
        "o/two/en/train/0000.parquet": parquet("e"),
        "o/big/default/partial-train/0000.parquet": parquet("f"),
    }
    asked = [
        *(["o/one", "train", "validation"], ["o/two:de", "train", None], ["o/two", "train", None]),
        *(["o/big", "train", None], ["o/one", "test", None], ["o/gone", "train", None]),
    ]
    with running(Hub(files)) as hub:
        made = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(asked)],
            env={**os.environ, **hub.environment},
            capture_output=True,
            text=True,
            check=True,
        )
    both, named, several, part, no_split, gone = map(json.loads, made.stdout.splitlines())
    branch = "@refs/convert/parquet"
    assert both == [
        [
            [f"hf://datasets/o/one{branch}/default/train/*.parquet"],
            [f"hf://datasets/o/one{branch}/default/validation/*.parquet"],
        ],
        [["a", "b", "c"], ["v"]],
    ]
    assert named == [[[f"hf://datasets/o/two{branch}/de/train/*.parquet"], []], [["d"]]]
    assert several == "the data set o/two has 2 configs; name one of them: o/two:de, o/two:en"
    assert part.startswith("the hub has only the first part of o/big's train as parquet")
    assert no_split.startswith("nothing is named test in o/one")
    assert gone.startswith("o/gone is no local file or folder, and no parquet data set of the hub")
