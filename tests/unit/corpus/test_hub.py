"""Data sets of the hub as a source's path, read from a hub on the loopback."""

import logging

import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem

from raydist.corpus.source import open_source
from raydist.errors import CorpusError
from raydist.job.schema import Corpus, Source
from tests.unit.autotrain.hub import Hub, running
from tests.unit.autotrain.test_data import parquet

TOKEN = "hf_" + "aB3" * 11
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/a*}
  - {split: test, path: data/b*}
---
"""
FILES = {
    "o/n/README.md": CARD.encode(),
    "o/n/data/a 1.parquet": parquet("a", "b"),
    "o/n/data/b1.parquet": parquet("t"),
    "o/n/more.jsonl": b'{"text": "m"}\n',
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that asks for TOKEN, which only the environment has."""
    with running(Hub(FILES, token=TOKEN)) as hub:
        hub.commit = "c0" * 20
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        address, constants = hub.environment["HF_ENDPOINT"], huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)  # both were read when the library was imported
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
    HfFileSystem.clear_instance_cache()


def opened(path, **options):
    source = open_source(Source(path=path, **options), Corpus(sources={"x": {"path": "x"}}))
    return source, sorted(source.texts(source.plan()))


def test_a_data_set_of_the_hub_is_read_by_split(hub):
    source, texts = opened("hf://datasets/o/n")
    size = len(FILES["o/n/data/a 1.parquet"])
    assert source.identity()["files"] == [["data/a 1.parquet", size, f"{size}:{size:040d}"]]
    assert {reason: found["count"] for reason, found in source.left_out.items()} == {
        "another split": 1, "companions of data": 1, "in no split": 1,
    }  # fmt: skip
    assert texts == ["a", "b"]
    assert opened("hf://datasets/o/n", split="test")[1] == ["t"]
    assert opened("hf://datasets/o/n@main/more.jsonl")[1] == ["m"]
    assert opened("hf://datasets/o/n/data/*.parquet")[1] == ["a", "b", "t"]


def test_everything_is_read_at_the_commit_of_the_listing(hub):
    source, _ = opened("hf://datasets/o/n")
    assert source.files[0].location == f"hf://datasets/o/n@{hub.commit}/data/a 1.parquet"
    asked = [path for _, path, _ in hub.requests if "/resolve/" in path or "/tree/" in path]
    assert len(asked) > 2 and all(hub.commit in path for path in asked)
    hub.commit = "d1" * 20
    changed, _ = opened("hf://datasets/o/n")
    assert hub.commit in changed.files[0].location
    assert changed.identity() == source.identity()


def test_the_token_comes_from_the_environment_and_stays_out_of_every_text(hub, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    source, _ = opened("hf://datasets/o/n")
    keys = {key for _, path, key in hub.requests if "/datasets/" in path}
    assert keys == {f"Bearer {TOKEN}"}
    with pytest.raises(CorpusError, match=r"cannot read hf://datasets/o/gone") as caught:
        opened("hf://datasets/o/gone/data")
    assert "hf auth login" in caught.value.fix and "repository not found" in caught.value.why
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CorpusError, match=r"cannot read hf://datasets/o/n"):
        opened("hf://datasets/o/n")
    written = "".join([caplog.text, *capfd.readouterr(), str(caught.value), repr(source)])
    assert "HTTP Request" in written and TOKEN not in written
