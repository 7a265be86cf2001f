"""The guide of AutoTrain's default trainer, small: its commands, its quick start and its examples.

The hub's models are small random ones in folders of their names. The commands and the quick start are
those of docs/autotrain.md. What the guide does about duplicates, growing blocks, collators and weights of
several corpora has its own tests.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raydist
from raydist import files
from raydist.autotrain import LLMTrainingParams, train
from raydist.cli import main
from raydist.errors import JobError, Stopped
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.track.records import effective
from tests.unit.autotrain.hub import Hub, running
from tests.unit.autotrain.parts import GPT2, LLAMA, write_base

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "autotrain.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
LINES = BLOCKS["bash"].replace("\\\n", "").splitlines()
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("raydist ")]
SENTENCE = "the patient presented with acute symptoms of the heart, and was treated at once; see figure"

pytestmark = pytest.mark.usefixtures("ray_local", "here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model and text that the guide names."""
    folder = tmp_path_factory.mktemp("guide")
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    write_base(folder / "gpt2", GPT2 | small | {"n_positions": 1024})
    for name in ("my-base-model", "my-existing-model", "long-code-model"):
        write_base(folder / name, GPT2 | small | {"n_positions": 2048})
    write_base(folder / "codeparrot" / "codeparrot-small", GPT2 | small | {"n_positions": 1024})
    write_base(folder / "meta-llama" / "Llama-2-7b-hf", LLAMA)
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for text in texts(1500)))
    for name, column in [("corpus", "text"), ("medical_texts", "content"), ("medical_papers", "abstract")]:
        (folder / f"{name}.json").write_text(json.dumps([{column: text} for text in texts(400)]))
    (folder / "wikipedia_2024.json").write_text(json.dumps([{"content": text} for text in texts(1500)]))
    (folder / "python_code.json").write_text(json.dumps([{"code": f"def f{n}(): pass"} for n in range(400)]))
    for name in ("new_data", "large_corpus"):
        pd.DataFrame({"text": texts(400)}).to_parquet(folder / f"{name}.parquet")
    for n in (1, 2, 3):
        pd.DataFrame({"text": texts(50, f"corpus {n}")}).to_json(folder / f"corpus{n}.json", orient="records")
    return folder


def texts(count: int, start: str = "paper") -> list[str]:
    return [f"{start} {n}: {SENTENCE} {n * n}." for n in range(count)]


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def records(project: str, kind: str) -> list[dict[str, Any]]:
    name = Path(project).name
    return [record for record in effective(RunFolder(Path(project) / name)) if record["kind"] == kind]


def loaded(project: str) -> Any:
    """The model that is in the project's folder, as transformers loads it."""
    ids = AutoTokenizer.from_pretrained(project)("the patient", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(project)
    with torch.inference_mode():
        assert torch.isfinite(model(ids).logits).all()
    return model


def adapter(project: str) -> dict[str, Any]:
    told: dict[str, Any] = files.read_json(Path(project) / "adapter_config.json")
    return told


# --- the commands


@pytest.mark.slow  # the quick start takes the same way
@pytest.mark.parametrize(
    "words", COMMANDS, ids=[words[words.index("--project-name") + 1] for words in COMMANDS]
)
def test_a_command_of_the_guide(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    project = words[words.index("--project-name") + 1]
    with pytest.raises(SystemExit) as ended:
        main([words[0], "--train", *words[1:]])
    assert ended.value.code == 0, capfd.readouterr()
    asked = files.read_json(Path(project) / "training_params.json")
    job = raydist.load_job(Path(project) / project / "raydist-job.yaml")
    assert records(project, "train")[-1]["samples"] > 0
    if project == "my-lm-model":
        assert (job.train.epochs, job.train.global_batch_size, job.train.lr) == (3, 32, 5e-5)
        assert job.packing.block_size == 1024
        ends = [record["step"] for record in records(project, "commit")]  # of the epochs
        assert len(ends) == 3
        assert [record["step"] for record in records(project, "eval")] == [0, *ends]
    if project == "llama-medical":
        assert (adapter(project)["r"], adapter(project)["lora_alpha"], job.quantization) == (32, 64, "int4")
    if project == "continued-pretraining":
        assert (job.train.epochs, job.packing.block_size, asked["block_size"]) == (1, 2048, 2048)
    loaded(project)


def test_the_commands_are_the_three() -> None:
    assert [words[0] for words in COMMANDS] == ["llm"] * 3


# --- Python


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub()) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.environment["HF_ENDPOINT"])
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


def test_the_quick_start_returns_the_model_and_pushes_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    monkeypatch.setenv("MY_TOKEN", "hf_" + "secret" * 5)
    more = 'config.push_to_hub, config.username, config.token = True, "me", "MY_TOKEN"\n'
    lines = BLOCKS["python"].splitlines(keepends=True)
    named: dict[str, Any] = {}
    exec("".join([*lines[:-1], more, lines[-1]]), named)
    assert lines[-1].startswith("model = train(config)")
    model, project = named["model"], Path("my-adapter")
    assert isinstance(model, peft.PeftModel)
    assert not hub.uploaded.keys() ^ {f"me/my-adapter/{p.name}" for p in project.iterdir() if p.is_file()}
    assert hub.uploaded["me/my-adapter/adapter_model.safetensors"]
    bearers = {told for method, _, told in hub.requests if method == "POST"}
    assert bearers == {f"Bearer {os.environ['MY_TOKEN']}"}
    written = [path for path in project.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if b"secretsecret" in path.read_bytes()]
    # the adapter, merged later into the same folder
    named["config"].push_to_hub, named["config"].merge_adapter = False, True
    del named["config"].given["username"], named["config"].given["token"]
    merged = train(named["config"])
    assert not isinstance(merged, peft.PeftModel) and not (project / "adapter_config.json").exists()
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_example_1_domain_adaptation() -> None:
    model = train(
        LLMTrainingParams(
            model="gpt2", data_path="./medical_papers.json", text_column="abstract",
            project_name="gpt2-medical", lr=2e-5, epochs=2, batch_size=4, block_size=1024,
            save_strategy="epoch",
        )
    )  # fmt: skip
    commits = [record["samples"] for record in records("gpt2-medical", "commit")]
    assert len(commits) == 2 and commits[0] < commits[1]
    of_project = loaded("gpt2-medical").state_dict()
    assert all(torch.equal(weight, of_project[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_example_2_is_stopped_and_goes_on() -> None:
    config = LLMTrainingParams(
        model="./my-existing-model", data_path="./wikipedia_2024.json", text_column="content",
        project_name="model-updated-2024", epochs=1, batch_size=2, lr=1e-5, block_size=2048,
        resume_from_checkpoint=True,
    )  # fmt: skip
    run = RunFolder(Path("model-updated-2024") / "model-updated-2024")
    stopper = threading.Thread(target=stop, args=(run,), daemon=True)
    stopper.start()
    with pytest.raises(Stopped):
        train(config)
    stopper.join()
    before = run.committed_steps()[-1]
    assert not (Path("model-updated-2024") / "config.json").exists()
    with pytest.raises(JobError, match=f"has a run at step {before}"):
        train(LLMTrainingParams(**{**config.given, "resume_from_checkpoint": False}))
    train(config)
    (resumed,) = records("model-updated-2024", "resume")
    last = records("model-updated-2024", "train")[-1]
    assert resumed["step"] == before < last["step"] and resumed["steps"] == last["step"]
    loaded("model-updated-2024")


def stop(run: RunFolder) -> None:
    while not run.status_file.exists() or run.status().get("state") != "training":
        time.sleep(0.05)
    run.stop_flag.touch()


@pytest.mark.slow
def test_example_3_code_without_eos() -> None:
    given = {
        "data_path": "./python_code.json", "text_column": "code", "project_name": "python-lm",
        "block_size": 2048, "add_eos_token": False, "epochs": 5, "batch_size": 4, "lr": 5e-5,
    }  # fmt: skip
    with pytest.raises(JobError, match="block_size 2048 is above the model's 1024 positions"):
        train(LLMTrainingParams(model="codeparrot/codeparrot-small", **given))
    train(LLMTrainingParams(model="long-code-model", **given))
    block = raydist.open_feed(Path("python-lm") / "python-lm").block(0)
    assert 0 not in np.asarray(block["labels"])  # 0 is EOS
    assert records("python-lm", "train")[-1]["samples"] % 5 == 0
    loaded("python-lm")


@pytest.mark.slow
def test_example_4_a_large_model_by_qlora() -> None:
    model = train(
        LLMTrainingParams(
            model="meta-llama/Llama-2-7b-hf", data_path="./large_corpus.parquet", text_column="text",
            project_name="llama-domain-adapted", peft=True, lora_r=64, lora_alpha=128, lora_dropout=0.1,
            target_modules="q_proj,k_proj,v_proj,o_proj", quantization="int4", mixed_precision="bf16",
            gradient_checkpointing=True, epochs=1, batch_size=1, gradient_accumulation=32, lr=2e-4,
        )
    )  # fmt: skip
    told = adapter("llama-domain-adapted")
    assert (told["r"], told["lora_alpha"], told["lora_dropout"]) == (64, 128, 0.1)
    assert set(told["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert type(model).__name__ == "PeftModelForCausalLM"
    first, *_ = records("llama-domain-adapted", "start")
    job = raydist.load_job(Path("llama-domain-adapted") / "llama-domain-adapted" / "raydist-job.yaml")
    assert (first["micro_batch_size"], job.train.global_batch_size) == (1, 32)
    assert (job.train.mixed_precision, job.train.gradient_checkpointing) == ("bf16", True)


# --- best practices


def clean_text(text: str) -> str | None:
    """As the guide's: other characters and spaces away, short texts dropped."""
    text = " ".join(re.sub(r"[^\w\s\.\,\!\?]", "", text).split())
    return text if len(text.split()) >= 10 else None


def test_cleaning_by_a_function_and_by_named_steps() -> None:
    raw = [*texts(40), "too short", "  many   spaces -- and; signs! in: a text of more than ten words?  "]
    Path("raw.json").write_text(json.dumps([{"text": text} for text in raw]))
    config = LLMTrainingParams(model="gpt2", data_path="raw.json", project_name="cleaned", eval_strategy="no")
    named = [
        {"characters": {"pattern": r"[^\w\s\.\,\!\?]"}},
        {"characters": {"pattern": r"\s+", "replacement": " "}},
        "whitespace",
        {"min_words": 10},
    ]
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    expected = sorted(filter(None, map(clean_text, raw)))
    assert len(expected) == 41
    for steps in ([f"{__name__}:clean_text"], named):
        values = config.job_values()
        values["corpus"]["clean"] = steps
        log = raydist.prepare(build_job(values)).logs["train"]
        found = [tokenizer.decode(document["input_ids"]) for document in log.documents()]
        assert sorted(found) == expected


@pytest.mark.slow
def test_several_data_sets_joined_by_pandas() -> None:
    frames = [pd.read_json(f"corpus{n}.json") for n in (1, 2, 3)]
    combined = pd.concat(frames, ignore_index=True).sample(frac=1).reset_index(drop=True)
    combined.to_json("combined_corpus.json")
    config = LLMTrainingParams(model="gpt2", data_path="corpus1.json", project_name="combined", epochs=1)
    config.data_path, config.eval_strategy = "combined_corpus.json", "no"
    train(config)
    assert RunFolder(Path("combined/combined")).data()["sources"]["train"]["n_documents"] == 150
    loaded("combined")


@pytest.mark.slow
def test_growing_blocks_as_the_guide_loops_and_as_one_run() -> None:
    shared = {
        "model": "gpt2", "data_path": "corpus1.json", "text_column": "text", "epochs": 1, "batch_size": 2,
        "gradient_accumulation": 2, "eval_strategy": "no", "logging_steps": 1, "lr": 1e-2,
    }  # fmt: skip
    for size in (16, 32, 64):
        train(LLMTrainingParams(**shared, block_size=size, project_name=f"model_{size}"))
    begun = [records(f"model_{size}", "train")[0]["loss"] for size in (16, 32, 64)]
    assert begun == pytest.approx([begun[0]] * 3, rel=0.05)  # each with the same model
    values = LLMTrainingParams(**shared, project_name="curriculum").job_values()
    del values["train"]["epochs"]
    values["stages"] = [{"block_size": size, "max_tokens": 600} for size in (16, 32, 64)]
    values["checkpoint"]["save_steps"] = 10
    run = raydist.train(build_job(values)).folder
    stages = [r["step"] for r in effective(RunFolder(run)) if r["kind"] == "stage"]
    losses = {r["step"]: r["loss"] for r in effective(RunFolder(run)) if r["kind"] == "train"}
    assert len(stages) == 2 and losses[stages[1] + 1] < 0.9 * begun[2]
    assert RunFolder(run).data()["audit"]["n_repeated"] == 0


@pytest.mark.slow
def test_monitoring_by_steps_and_the_best_model() -> None:
    train(
        LLMTrainingParams(
            model="gpt2", data_path="corpus.json", valid_split="corpus1.json", project_name="monitored",
            lr=1e-2, block_size=64, batch_size=2, gradient_accumulation=2, epochs=1, logging_steps=5,
            eval_strategy="steps", eval_steps=10, log="wandb", save_strategy="steps", save_steps=20,
            save_total_limit=3, load_best_model_at_end=True, metric_for_best_model="eval_loss",
            warmup_ratio=0.05, scheduler="cosine",
        )
    )  # fmt: skip
    steps = records("monitored", "start")[0]["steps"]
    evaluated = records("monitored", "eval")
    assert [r["step"] for r in evaluated] == [*range(0, steps, 10), steps]
    assert {r["source"] for r in evaluated} == {"valid"}
    assert {r["step"] for r in records("monitored", "train")} >= set(range(5, steps, 5))
    best = min(evaluated, key=lambda r: r["eval_loss"])["step"]
    kept = RunFolder(Path("monitored/monitored")).committed_steps()
    assert best in kept and set(range(20, steps, 20)) & set(kept) and 3 <= len(kept) <= 4
    assert any(Path("monitored/monitored/wandb").glob("offline-run-*/*.wandb"))
    loaded("monitored")
