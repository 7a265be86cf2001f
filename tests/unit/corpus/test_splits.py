"""Folders that are data sets: splits by a card, by save_to_disk, by names; and pointers in place of files."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydist.corpus.formats import Bad
from raydist.corpus.slices import read_slice
from raydist.corpus.source import open_source
from raydist.errors import CorpusError
from raydist.job.schema import Corpus, Source


def made(folder, *names):
    """Files whose only document is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = name.removesuffix(".jsonl").removesuffix(".parquet")
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [text]}), path)
        elif name.endswith(".jsonl"):
            path.write_text(json.dumps({"text": text}) + "\n")
        else:
            path.write_text(text + "\n")
    return folder


def opened(path, on_error="fail", **options):
    corpus = Corpus(sources={"s": {"path": "x"}}, on_error=on_error)
    return open_source(Source(path=str(path), **options), corpus)


def names(path, **options):
    return [file.name for file in opened(path, **options).files]


def left_out(path, **options):
    return {reason: found["count"] for reason, found in opened(path, **options).left_out.items()}


def card(folder, configs, **more):
    lines = [
        "---",
        f"configs: {json.dumps(configs)}",
        *(f"{key}: {value}" for key, value in more.items()),
        "---",
    ]
    (folder / "README.md").write_text("\n".join([*lines, "# A card", ""]))


# --- the card


def test_a_card_names_the_files_of_a_split(tmp_path):
    made(tmp_path, "a.jsonl", "b.jsonl", "holdout/c.jsonl", "raw/d.jsonl", "script.py")
    files = [{"split": "train", "path": ["a.jsonl", "./b.*"]}, {"split": "test", "path": "holdout/*"}]
    card(tmp_path, [{"config_name": "default", "data_files": files}], license="mit", made="2024-01-02")
    assert names(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert left_out(tmp_path) == {"another split": 1, "companions of data": 1, "in no split": 2}
    assert names(tmp_path, split="test") == ["holdout/c.jsonl"]
    assert names(tmp_path, split="all") == ["a.jsonl", "b.jsonl", "holdout/c.jsonl"]
    with pytest.raises(CorpusError, match="no split validation") as caught:
        names(tmp_path, split="validation")
    assert "test, train" in caught.value.why
    assert names(tmp_path, exclude=["README.md", "*.py"]) == [
        "a.jsonl",
        "b.jsonl",
        "holdout/c.jsonl",
        "raw/d.jsonl",
    ]


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("*.jsonl", ["a.jsonl", "train.jsonl"]),
        (["a.jsonl"], ["a.jsonl"]),
        ({"train": "a.jsonl", "test": "train.jsonl"}, ["a.jsonl"]),
    ],
)
def test_every_form_of_data_files_is_read(tmp_path, data_files, expected):
    made(tmp_path, "a.jsonl", "train.jsonl")
    card(tmp_path, [{"config_name": "x", "data_files": data_files}])
    assert names(tmp_path) == expected


def test_the_default_config_is_read_and_a_choice_is_the_users(tmp_path):
    made(tmp_path, "en/train.jsonl", "en/test.jsonl", "de/train.jsonl")
    configs = [{"config_name": "en", "data_dir": "en"}, {"config_name": "de", "data_files": "de/*"}]
    card(tmp_path, configs)
    with pytest.raises(CorpusError, match="2 configs, and none is the default") as caught:
        names(tmp_path)
    assert "en (en/), de (de/*)" in caught.value.why
    card(tmp_path, [{**configs[0], "default": True}, configs[1]])
    assert names(tmp_path) == ["en/train.jsonl"]
    card(tmp_path, [configs[0], {**configs[1], "config_name": "default"}])
    assert names(tmp_path) == ["de/train.jsonl"]


def test_a_split_whose_files_are_missing_is_refused_only_if_it_is_wanted(tmp_path):
    made(tmp_path, "data/train-1.jsonl")
    files = [{"split": name, "path": f"data/{name}-*"} for name in ("train", "test")]
    card(tmp_path, [{"config_name": "default", "data_files": files}])
    assert names(tmp_path) == ["data/train-1.jsonl"]
    with pytest.raises(CorpusError, match="no split test"):
        names(tmp_path, split="test")


def test_a_card_that_cannot_be_read_is_refused_and_another_front_matter_is_no_card(tmp_path):
    made(tmp_path, "a.jsonl", "b.txt")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\nA card.\n")
    with pytest.raises(CorpusError, match=r"the YAML at the start of README\.md cannot be read"):
        names(tmp_path)
    (tmp_path / "README.md").write_text("---\ntitle: A post\n---\nA text.\n")
    assert names(tmp_path) == ["README.md", "a.jsonl", "b.txt"]


# --- save_to_disk


def saved(folder, n_files=2):
    """As save_to_disk of the datasets library writes it, with a cache that `map` left."""
    folder.mkdir(parents=True)
    files = [f"data-{n:05d}-of-{n_files:05d}.arrow" for n in range(n_files)]
    for name in [*files, "cache-0123.arrow"]:
        table = pa.table({"text": [f"{folder.name} {name} {row}" for row in range(50)]})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    state = {"_data_files": [{"filename": name} for name in files], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{\n  "features": {}\n}')
    return folder


@pytest.mark.parametrize("fmt", ["auto", "arrow"])
def test_a_saved_data_set_is_the_files_that_its_state_lists(tmp_path, fmt):
    folder = saved(tmp_path / "set")
    source = opened(folder, format=fmt)
    assert [file.name for file in source.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert left_out(folder, format=fmt) == {"companions of data": 3}
    source = open_source(Source(path=str(folder)), Corpus(sources={"s": {"path": "x"}}, slice_bytes=1024))
    assert len(list(source.texts(source.plan()))) == 100
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"state.json names data-00001-of-00002.arrow, which is missing"):
        names(folder, format=fmt)


def test_a_saved_dict_of_splits_is_read_by_split(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, 1)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert names(tmp_path / "set") == ["train/data-00000-of-00001.arrow"]
    assert left_out(tmp_path / "set") == {"another split": 1, "companions of data": 7}
    assert names(tmp_path / "set", split="test") == ["test/data-00000-of-00001.arrow"]
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(CorpusError, match="no split train"):
        names(tmp_path / "set")


# --- names


def test_the_hubs_own_names_of_parts_declare_splits(tmp_path):
    parts = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002-a1b2.parquet"]
    made(tmp_path, *parts, "data/test_sft-00000-of-00001.parquet", "raw.parquet", "README.md", "load.py")
    assert names(tmp_path) == parts
    assert left_out(tmp_path) == {"another split": 1, "companions of data": 1, "in no split": 2}
    assert names(tmp_path, split="test_sft") == ["data/test_sft-00000-of-00001.parquet"]
    with pytest.raises(CorpusError, match="no split train"):
        names(made(tmp_path / "other", "data/en-00000-of-00001.parquet"))


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (
            ["data/my_train_1.jsonl", "data/my_eval_1.jsonl"],
            ["data/my_train_1.jsonl"],
            ["data/my_eval_1.jsonl"],
        ),
        (["train/test-1.jsonl", "testing/a.jsonl"], ["train/test-1.jsonl"], ["testing/a.jsonl"]),
        (["train.jsonl", "test.jsonl", "more.jsonl"], ["more.jsonl", "train.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "test.jsonl", "README.md", "load.py"], ["train.jsonl"], ["test.jsonl"]),
    ],
)
def test_words_in_names_give_splits(tmp_path, files, train, test):
    made(tmp_path, *files)
    assert names(tmp_path) == train
    assert names(tmp_path, split="test") == test
    assert names(tmp_path, split="eval") == test
    assert sum(left_out(tmp_path).values()) == len(files) - len(train)
    assert names(f"{tmp_path}/**/*.jsonl") == sorted(file for file in files if file.endswith("jsonl"))


@pytest.mark.parametrize(
    "files",
    [
        ["a.jsonl", "test.jsonl", "README.md", "b.txt"],
        ["train.jsonl", "more.txt", "README.md"],
        ["trainer.jsonl", "latest.jsonl"],
        ["src/train.py", "src/test.py", "notes/test.md", "a.txt"],
    ],
)
def test_a_folder_without_train_and_another_split_is_read_as_a_whole(tmp_path, files):
    made(tmp_path, *files)
    assert names(tmp_path) == sorted(files)
    assert left_out(tmp_path) == {}


def test_a_readme_next_to_tables_is_no_text(tmp_path):
    made(tmp_path, "a.parquet", "sub/b.jsonl", "README.md")
    assert names(tmp_path) == ["a.parquet", "sub/b.jsonl"]
    assert names(tmp_path, format="text") == ["README.md", "a.parquet", "sub/b.jsonl"]


def test_a_split_that_no_folder_has_is_refused(tmp_path):
    made(tmp_path, "a.jsonl")
    assert names(tmp_path, split="train") == names(tmp_path / "a.jsonl", split="test") == ["a.jsonl"]
    with pytest.raises(CorpusError, match="no split test"):
        names(tmp_path, split="test")


# --- Git LFS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"


@pytest.mark.parametrize(
    "name", ["txt", "jsonl", "json", "csv", "md", "parquet", "arrow", "jsonl.gz", "csv.zst"]
)
def test_a_pointer_of_git_lfs_is_refused_by_name_and_is_bad(tmp_path: Path, name: str):
    made(tmp_path, "a.jsonl")
    (tmp_path / f"b.{name}").write_text(POINTER)
    with pytest.raises(CorpusError, match="Git LFS") as caught:
        opened(tmp_path)
    assert caught.value.where == f"b.{name}" and "git lfs pull" in caught.value.fix
    assert names(tmp_path, exclude=["b.*"]) == ["a.jsonl"]
    source = opened(tmp_path, on_error="quarantine")
    items = [
        item
        for part in source.plan()
        for chunk in read_slice(source.files, part, source.options)
        for item in chunk
    ]
    reason = "a Git LFS pointer, not the file itself: run `git lfs pull`"
    assert [item for _, item in items if isinstance(item, Bad)] == [Bad(None, reason)]
