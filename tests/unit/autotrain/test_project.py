"""The project's folder: what is whose, what is resumed, what goes to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from raydist import files
from raydist.autotrain import LLMTrainingParams, project
from raydist.autotrain.project import PARAMETERS, publish, push, read_token
from raydist.errors import JobError, RunError
from raydist.folder import RunFolder
from tests.unit.autotrain.hub import Hub, running
from tests.unit.autotrain.parts import GPT2, write_base

FILES = {"config.json": "{}", "model.safetensors": "weights", "README.md": "a card"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "gpt2", GPT2)
    (tmp_path / "corpus.txt").write_text("a\n")
    return tmp_path


def config(**more: Any) -> LLMTrainingParams:
    return LLMTrainingParams(model="gpt2", data_path="corpus.txt", project_name="p", **more)


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        files.write_text(folder / name, text)


def finished(storage: Path, contents: dict[str, str] = FILES) -> Path:
    """A run's folder with a job and a model."""
    run = storage / "p"
    RunFolder(run).mark("run")
    RunFolder(run).write_job("name: p\n")
    write_files(run / "model", contents)
    return run


def refusal(**more: Any) -> str:
    """What stands in the way before anything starts."""
    with pytest.raises(JobError) as told:
        project.run(config(**more))
    _, *lines = told.value.what.splitlines()
    assert len(lines) == 1
    return lines[0].strip()


# --- the model in P


def test_the_final_files_are_linked_and_the_parameters_written(here: Path) -> None:
    run = finished(here)
    (here / "notes.md").write_text("mine")
    asked = config(lr=1e-3, push_to_hub=True, username="me", token="SOME_NAME")
    assert publish(RunFolder(run), here, asked) == [*sorted(FILES), PARAMETERS]
    for name, text in FILES.items():
        assert (here / name).read_text() == text and (here / name).samefile(run / "model" / name)
    told = files.read_json(here / PARAMETERS)
    assert (told["lr"], told["epochs"], told["token"]) == (1e-3, 3, "(redacted)")
    assert "SOME_NAME" not in (here / PARAMETERS).read_text() and (here / "notes.md").read_text() == "mine"
    assert publish(RunFolder(run), here, asked) == [*sorted(FILES), PARAMETERS]


def test_without_hard_links_the_files_are_copied(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(project.os, "link", refuse)
    run = finished(here)
    publish(RunFolder(run), here, config())
    assert (here / "config.json").read_text() == "{}"
    assert not (here / "config.json").samefile(run / "model" / "config.json")
    publish(RunFolder(run), here, config())  # a copy is known by its content


def test_a_file_that_is_not_the_runs_is_neither_replaced_nor_removed(here: Path) -> None:
    run = finished(here)
    (here / "README.md").write_text("mine")
    with pytest.raises(RunError, match=r"has README\.md, which the run did not write"):
        publish(RunFolder(run), here, config())
    assert (here / "README.md").read_text() == "mine" and not (here / "config.json").exists()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_folder_and_a_dead_link_in_the_way_are_told_too(here: Path, make: Any) -> None:
    run = finished(here)
    make(here / "config.json")
    with pytest.raises(RunError, match=r"has config\.json, which the run did not write"):
        publish(RunFolder(run), here, config())


def test_an_adapter_that_is_merged_later_leaves_nothing_of_itself_in_p(here: Path) -> None:
    adapter = {"adapter_config.json": "{}", "adapter_model.safetensors": "small", "README.md": "a card"}
    run = finished(here, adapter)
    publish(RunFolder(run), here, config(peft=True))
    write_files(run / "export" / "merged", {"config.json": "{}", "model.safetensors": "large"})
    (here / "vocab.json").write_text("mine")
    names = publish(RunFolder(run), here, config(peft=True, merge_adapter=True))
    assert names == ["config.json", "model.safetensors", PARAMETERS]
    assert {p.name for p in here.iterdir() if p.is_file()} == {*names, "vocab.json", "corpus.txt"}


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-2.safetensors", "README.md", PARAMETERS])
def test_files_that_would_be_in_the_way_are_told_before_the_run(here: Path, name: str) -> None:
    write_files(here / "p", {name: "not ours"})
    assert refusal().startswith(f"project_name: p has {name}: ")
    assert (here / "p" / name).read_text() == "not ours"


# --- resuming


def commit(run: Path, *steps: int) -> None:
    for step in steps:
        files.write_text(run / "checkpoints" / f"step-{step:08d}" / "COMMIT.json", "{}")


def test_a_resume_is_refused_with_its_reason(here: Path) -> None:
    run = here / "p" / "p"
    commit(run, 5, 10)
    commit(here / "other", 5)
    (here / "checkpoint-500").mkdir()
    assert "has a run at step 10; leave it out to go on" in refusal(resume_from_checkpoint=False)
    for asked, reason in {
        "p/p/checkpoints/step-00000005": "is not the newest checkpoint, step-00000010",
        "checkpoint-500": "is a checkpoint of transformers' Trainer; to train it further give --model",
        "other/checkpoints/step-00000005": "does not belong to this project's run",
        "gone": "no folder gone",
    }.items():
        assert reason in refusal(resume_from_checkpoint=asked)


@pytest.mark.parametrize(
    "asked", [None, True, "auto", "p/p", "p/p/checkpoints", "p/p/checkpoints/step-00000010"]
)
def test_a_resume_from_the_newest_checkpoint_is_what_is_done(here: Path, asked: Any) -> None:
    run = here / "p" / "p"
    commit(run, 5, 10)
    assert list(project._problems(config(resume_from_checkpoint=asked))) == []


def test_a_path_without_a_checkpoint_is_refused_and_the_first_run_is_not(here: Path) -> None:
    (here / "p" / "p").mkdir(parents=True)
    assert "has no checkpoint yet" in refusal(resume_from_checkpoint="p/p")
    assert list(project._problems(config(resume_from_checkpoint=False))) == []


# --- the hub


def test_a_token_comes_from_a_variable_or_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_one")
    (here / "token").write_text("hf_two\n")
    assert [read_token(named) for named in ("MY_TOKEN", "${MY_TOKEN}", "token")] == ["hf_one"] * 2 + [
        "hf_two"
    ]


@pytest.mark.parametrize("named", ["NO_SUCH_NAME", "secret-that-is-no-name"])
def test_a_missing_token_is_told_before_the_run(here: Path, named: str) -> None:
    told = refusal(push_to_hub=True, username="me", token=named)
    assert told.startswith("token: ") and ("NO_SUCH" in told) == (named == "NO_SUCH_NAME")
    assert "secret-that" not in told and not (here / "p").exists()


def test_a_name_that_the_hub_refuses_is_told_before_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_one")
    told = refusal(push_to_hub=True, username="me and you", token="MY_TOKEN")
    assert told.startswith("username: the hub does not accept the repository name me and you/p: ")


def test_the_final_files_reach_the_hub_and_the_token_only_its_header(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(here)
    names = publish(RunFolder(run), here, config())
    with running(Hub()) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.environment["HF_ENDPOINT"])
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        push(here, names, "me/p", "hf_secret")
    assert hub.uploaded == {f"me/p/{name}": (here / name).read_bytes() for name in names}
    assert hub.created == [{"name": "p", "organization": "me", "visibility": "private"}]
    writes = [(path, told) for method, path, told in hub.requests if method == "POST"]
    assert writes and all(told == "Bearer hf_secret" for _, told in writes)
    assert all("hf_secret" not in path for path, _ in writes)


def test_a_hub_that_does_not_answer_leaves_the_model_and_tells_no_token(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RunError, match="could not be uploaded to me/p") as told:
        push(here, [], "me/p", "hf_secret")
    assert "hf_secret" not in str(told.value) and told.value.__cause__ is None
