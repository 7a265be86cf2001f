"""Every problem of a job file is told at once, with its place; overrides are part of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist.errors import JobError
from raydist.job.identity import differences
from raydist.job.load import build_job, job_yaml, load_job
from raydist.job.schema import Job

MINIMAL = """\
name: small
model: {base: some/model}
corpus: {sources: {prose: {path: data}}}
train: {max_steps: 10, lr: 5e-5}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(write(tmp_path, text), overrides)
    return str(caught.value)


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = MINIMAL + "model2: x\n".replace("model2: x\n", "storage: no\n")
    job = load_job(write(tmp_path, text))
    assert job.train.lr == 5e-5
    assert job.storage == "no"


def test_octal_is_written_as_in_yaml_1_2_and_true_is_no_number(tmp_path: Path) -> None:
    steps = [
        load_job(write(tmp_path, MINIMAL), [f"train.max_steps={n}"]).train.max_steps for n in ("010", "0o10")
    ]
    assert steps == [10, 8]
    for key in ("train.max_steps", "train.lr", "packing.block_size", "seed"):
        with pytest.raises(JobError, match="true is no value for it") as refused:
            load_job(write(tmp_path, MINIMAL), [f"{key}=true"])
        assert key in str(refused.value)
    assert load_job(
        write(tmp_path, MINIMAL), ["train.gradient_checkpointing=true"]
    ).train.gradient_checkpointing


def test_no_mixed_precision_is_fp32(tmp_path: Path) -> None:
    """As users of Hugging Face write it; the job, and so a run's identity, has one name for it."""
    jobs = [load_job(write(tmp_path, MINIMAL), [f"train.mixed_precision={p}"]) for p in ("no", "fp32")]
    assert [job.train.mixed_precision for job in jobs] == ["fp32", "fp32"]
    assert differences(*jobs) == []


def test_defaults_are_written_out_and_load_again(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL))
    resolved = job_yaml(job)
    assert yaml.safe_load(resolved)["packing"]["block_size"] == 1024
    assert load_job(write(tmp_path, resolved)) == job


def test_unknown_keys_name_the_nearest_or_their_place(tmp_path: Path) -> None:
    told = problems(tmp_path, MINIMAL + "lr: 3\nseeed: 1\n")
    assert "job.yaml:5: lr: unknown key; it belongs at train.lr" in told
    assert "job.yaml:6: seeed: unknown key; did you mean seed?" in told


def test_all_problems_at_once_with_lines(tmp_path: Path) -> None:
    text = (
        "name: x\nmodel: {base: a, config: {model_type: llama}}\n"
        "corpus:\n  sources:\n    a: {weight: 2}\ntrain:\n  lr: fast\n  max_steps: 1\n"
    )
    told = problems(tmp_path, text)
    assert told.startswith("4 problems in the job")
    for place in (
        "job.yaml:2: model.base: give exactly one of base",
        "job.yaml:5: corpus.sources.a.path",
        "job.yaml:5: corpus.sources.a.weight",
    ):
        assert place in told
    assert "job.yaml:7: train.lr: Input should be a valid number" in told and "'fast'" in told


def test_a_wrong_union_is_one_problem(tmp_path: Path) -> None:
    told = problems(tmp_path, MINIMAL, "train.micro_batch_size=many")
    assert told.startswith("1 problem in the job") and "--set train.micro_batch_size" in told


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    assert "the key name is given twice" in problems(tmp_path, MINIMAL + "name: other\n")


def test_overrides_make_sections_and_keep_types(tmp_path: Path) -> None:
    job = load_job(
        write(tmp_path, MINIMAL), ["adapter.r=4", "eval.sources.news.path=[a, b]", "train.lr=1e-3"]
    )
    assert job.adapter is not None and job.adapter.r == 4
    assert job.eval.sources["news"].path == ["a", "b"]
    assert job.train.lr == 1e-3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.lr"], "is not KEY=VALUE"),
        (["train.epochs=2"], "exactly one of max_steps, max_tokens and epochs"),
        (["corpus.sources.prose.weight=0.5"], "add up to 0.5"),
        (["corpus.sources.other={path: x, weight: 0.5}"], "every source a weight, or none"),
        (["storage=ftp://host/runs"], "ftp://host/runs is no place for runs"),
        (["name=tokens"], "the folder that runs share"),
        (["name=../up"], "should match pattern"),
        (["model={config: {model_type: llama}}"], "needs a tokenizer"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in problems(tmp_path, MINIMAL, *overrides)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="raydist init"):
        load_job(tmp_path / "none.yaml")


def test_identity_is_what_decides_the_weights() -> None:
    values = yaml.safe_load(MINIMAL.replace("5e-5", "5.0e-5"))
    job = build_job(values)
    same = build_job(
        {**values, "scaling": {"num_workers": 4}, "train": {**values["train"], "logging_steps": 1}}
    )
    other = build_job({**values, "train": {**values["train"], "lr": 1.0}})
    assert differences(job, same) == []
    assert differences(job, other) == ["train.lr: 5e-05 -> 1.0"]


def test_an_optimizers_defaults_written_out_are_the_same_run() -> None:
    values = yaml.safe_load(MINIMAL.replace("5e-5", "5.0e-5"))

    def with_optimizer(optimizer: Any) -> Job:
        return build_job({**values, "train": {**values["train"], "optimizer": optimizer}})

    adamw = build_job(values)
    written = {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8}
    assert differences(adamw, with_optimizer(written)) == []
    assert differences(adamw, build_job(yaml.safe_load(job_yaml(with_optimizer("adamw"))))) == []
    assert differences(adamw, with_optimizer({"betas": [0.9, 0.95]})) == [
        "train.optimizer.betas: [0.9, 0.999] -> [0.9, 0.95]"
    ]
    assert differences(adamw, with_optimizer("muon")) == ["train.optimizer.name: 'adamw' -> 'muon'"]


def test_an_end_of_an_epoch_needs_epochs(tmp_path: Path) -> None:
    by_epoch = MINIMAL + "checkpoint: {save_steps: epoch}\neval: {eval_steps: epoch}\n"
    told = problems(tmp_path, by_epoch)
    assert "job.yaml:5: checkpoint.save_steps: epoch needs train.epochs" in told
    assert "job.yaml:6: eval.eval_steps: epoch needs train.epochs" in told
    epochs = by_epoch.replace("max_steps: 10", "epochs: 2")
    assert load_job(write(tmp_path, epochs)).eval.eval_steps == "epoch"


def test_stages_have_the_length_of_a_run(tmp_path: Path) -> None:
    stages = "stages: [{block_size: 64, max_tokens: 1e5}, {block_size: 128, max_tokens: 1e5}]\n"
    assert "stages have lengths of their own" in problems(tmp_path, MINIMAL + stages)
    without = MINIMAL.replace("max_steps: 10, ", "")
    assert "give exactly one of max_steps, max_tokens and epochs" in problems(tmp_path, without)
    told = problems(tmp_path, without + stages, "train.global_batch_tokens=192")
    assert "192 is not a multiple of a block_size of stages, 128" in told
    assert load_job(write(tmp_path, without + stages)).block_sizes == [64, 128]
