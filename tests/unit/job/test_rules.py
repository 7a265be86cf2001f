"""The rules between keys: each is broken once, all are reported at once, each at the line of its key."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydist.errors import JobError
from raydist.job import check
from raydist.job.foreign import FOREIGN
from raydist.job.load import build_job, job_yaml, load_job
from raydist.job.rules import RULES, Rule
from raydist.job.schema import Fields, Job, Packing, Train

MINIMAL = """\
name: small
model: {base: some/model}
corpus: {sources: {prose: {path: data}}}
train: {max_tokens: 1000}
"""
GRID = "tune={search: {train.lr: {grid: [1e-4, 1e-3]}}}"
CONFIG = "model={config: {model_type: llama}, tokenizer: t}"
EXTEND = "train.extend={max_tokens: 1e6}"
STAGES = "stages=[{block_size: 64, max_tokens: 1e5}, {block_size: 96, max_tokens: 1e5}]"
SEARCH = "--set tune: tune.search."
ZERO = ("strategy.name=zero", "strategy.stage=3")


def searched(key: str, distribution: str, **more: str) -> str:
    others = "".join(f", {name}: {value}" for name, value in more.items())
    return f"tune={{search: {{{key}: {distribution}}}, trials: 2{others}}}"


CASES: list[tuple[tuple[str, ...], str]] = [
    (("name=tokens",), "--set name: name: tokens is the folder"),
    (("storage=ftp://b/runs",), "--set storage: storage: ftp://b/runs is no place for runs"),
    (("model.config={model_type: llama}",), "job.yaml:2: model.base: give exactly one of base"),
    (("model={config: {a: 1}, tokenizer: t}",), "--set model: model.config: config needs model_type"),
    (("model={config: {model_type: llama}}",), "--set model: model.config: a model from config needs a tok"),
    (
        (CONFIG, "model.add_tokens=[a]"),
        "--set model.add_tokens: model.add_tokens: a model from config has its tokenizer's vocabulary",
    ),
    (
        ("model.add_tokens=more", "model.tokenizer=t"),
        "--set model.add_tokens: model.add_tokens: add_tokens names a tokenizer, and model.tokenizer another",
    ),
    (
        ("model.add_tokens=[a]", "adapter={r: 4}"),
        "--set model.add_tokens: model.add_tokens: an adapter does not train the new tokens' embeddings; set",
    ),
    (
        ("model.attn_implementation=flash_attention_2", "train.mixed_precision=fp32"),
        "--set model.attn_implementation: model.attn_implementation: flash_attention_2 computes in 16 bits",
    ),
    (
        ("corpus.sources.b={path: b, weight: 1}",),
        "job.yaml:3: corpus.sources: give every source a weight, or none",
    ),
    (("corpus.sources.prose.weight=0.5",), "job.yaml:3: corpus.sources: the weights add up to 0.5"),
    (
        ("corpus.sources.prose.weight=1", "train.max_tokens=null", "train.epochs=1"),
        "--set train.epochs: train.epochs: sources with weights need",
    ),
    (
        ("corpus.sources.prose.replay=true",),
        "job.yaml:3: corpus.sources: every source is replayed",
    ),
    (
        ("corpus.sources.b={path: b, replay: true}", "corpus.sources.c={path: c}"),
        "job.yaml:3: corpus.sources: with replay and 2 other sources, give every source a weight",
    ),
    (
        ("corpus.sources.b={path: b, replay: true}", "train.max_tokens=null", "train.epochs=1"),
        "--set train.epochs: train.epochs: replayed sources have a weight",
    ),
    (
        ("corpus.sources.prose={path: a, delimiter: '|', quote: '|'}",),
        "--set corpus.sources.prose: corpus.sources.prose.delimiter: prose has '|' for delimiter and quote",
    ),
    (
        ("eval.sources.e={path: a, delimiter: ';', quote: ';'}",),
        "--set eval.sources.e: eval.sources.e.delimiter: e has ';' for delimiter and quote",
    ),
    (("train.epochs=1",), "job.yaml:4: train.max_tokens: give exactly one of max_steps, max_tokens and epo"),
    ((STAGES,), "job.yaml:4: train.max_tokens: stages have lengths of their own"),
    (("checkpoint.save_steps=epoch",), "--set checkpoint.save_steps: checkpoint.save_steps: epoch needs"),
    (("eval.eval_steps=epoch",), "--set eval.eval_steps: eval.eval_steps: epoch needs train.epochs"),
    (
        ("train.global_batch_size=2", "train.global_batch_tokens=2048"),
        "--set train.global_batch_size: train.global_batch_size: give one of",
    ),
    (
        ("train.global_batch_tokens=1000",),
        "--set train.global_batch_tokens: train.global_batch_tokens: train.global_batch_tokens 1000 is not a",
    ),
    (
        (STAGES, "train.max_tokens=null", "train.global_batch_tokens=128"),
        "--set stages: stages.1.block_size: train.global_batch_tokens 128 is not a multiple of a block_size",
    ),
    (
        (EXTEND, "train.max_tokens=null", "train.epochs=1"),
        "--set train.extend: train.extend: a run of epochs cannot be extended",
    ),
    ((EXTEND, STAGES, "train.max_tokens=null"), "--set train.extend: train.extend: a run with stages cannot"),
    (
        (EXTEND, "tune={search: {train.lr: {grid: [1e-4]}}}"),
        "--set train.extend: train.extend: a sweep's trials are new runs",
    ),
    (
        ("train.extend={max_tokens: 1e6, rewarm: false}",),
        "--set train.extend: train.extend: rewarm: false keeps the learning rate",
    ),
    (("quantization=int4",), "--set quantization: quantization: int4 needs an adapter"),
    (("strategy.stage=2",), "--set strategy.stage: strategy.stage: name: ddp has no stage"),
    (("strategy.offload=cpu",), "--set strategy.offload: strategy.offload: name: ddp has no offload"),
    (("strategy.config={a: 1}",), "--set strategy.config: strategy.config: name: ddp has no config"),
    (("strategy.name=zero",), "--set strategy.name: strategy.name: name: zero needs stage: 1, 2 or 3"),
    (
        (*ZERO, "train.gradient_checkpointing=selective"),
        "--set train.gradient_checkpointing: train.gradient_checkpointing: selective does not work under",
    ),
    (
        (*ZERO, "strategy.config={fp16: {enabled: true}}"),
        "--set strategy.config: strategy.config: the DeepSpeed config contradicts the job",
    ),
    (
        ("train.embedding_learning_rate=1e-5", "adapter={r: 4}"),
        "--set train.embedding_learning_rate: train.embedding_learning_rate: an adapter does not train",
    ),
    (
        ("train.optimizer=muon", *ZERO),
        "--set train.optimizer: train.optimizer: muon does not work under strategy zero: DeepSpeed steps",
    ),
    (
        ("train.compile=true", *ZERO),
        "--set train.compile: train.compile: layers are not compiled under strategy zero: DeepSpeed gathers",
    ),
    (
        ("train.optimizer={name: adafactor, betas: [0.9, 0.99]}",),
        "--set train.optimizer: train.optimizer.betas: adafactor has no betas",
    ),
    (
        ("train.optimizer=adafactor", "train.optimizer.eps=1e-6"),
        "--set train.optimizer.eps: train.optimizer.eps: adafactor has no eps",
    ),
    (
        ("scaling.num_workers=[1, 33]",),
        "--set scaling.num_workers: scaling.num_workers: [1, 33] goes up to 33 workers, and a step has",
    ),
    (
        ("scaling.grow_after=60", "scaling.num_workers=3"),
        "--set scaling.grow_after: scaling.grow_after: a run of 3 workers does not grow; grow_after is",
    ),
    (
        ("scaling.num_workers=[1, 2]", GRID),
        "--set scaling.num_workers: scaling.num_workers: a sweep's trials have a number of work",
    ),
    (
        ("guards.threshold=2",),
        "--set guards.threshold: guards.threshold: at 2 deviations about 4.55% of all good steps would be",
    ),
    (
        ("guards.threshold=101",),
        "--set guards.threshold: guards.threshold: nothing would ever be a spike: where losses vary by 1%",
    ),
    (
        ("guards.mode=on",),
        "--set guards.mode: guards.mode: no spike would be found: window: 128 needs 64 steps before the",
    ),
    ((searched("train.lr", "{choice: [1], grid: [1]}"),), f"{SEARCH}train.lr: give exactly one of"),
    (
        (searched("train.lr", "{uniform: [1, 1]}"),),
        f"{SEARCH}train.lr: the range [1, 1] is inverted or empty",
    ),
    (
        (searched("train.lr", "{loguniform: [0, 1]}"),),
        f"{SEARCH}train.lr: loguniform needs a low end above 0",
    ),
    (
        (searched("storage", "{choice: [a]}"),),
        f"{SEARCH}storage: storage cannot be se",
    ),
    (
        (searched("packing.block_size", "{choice: [64]}"), STAGES, "train.max_tokens=null"),
        f"{SEARCH}packing.block_size: packing.block_size has no effect next to stages",
    ),
    (
        (searched("packing.block_size", "{choice: [64]}"), "train={max_steps: 3}"),
        f"{SEARCH}packing.block_size: trials of equal steps would see unequal text",
    ),
    ((GRID, "tune.searcher=optuna"), "--set tune.searcher: tune.searcher: optuna has no grid (train.lr)"),
    ((GRID, "tune.trials=3"), "--set tune.trials: tune.trials: trials: 3, but the grid has 2 points"),
    (
        (GRID, "tune.max_tokens=1e5", "train={max_steps: 3}"),
        "--set tune.max_tokens: tune.max_tokens: tune.max_tokens, a budget, needs the length",
    ),
    (
        (GRID, "tune.max_tokens=10"),
        "--set tune.max_tokens: tune.max_tokens: tune.max_tokens 10 is too small for one trial",
    ),
]
"""For each rule of the list, in its order: overrides that break it, and its message with the place."""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the message, the folder left out."""
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    count, *lines = caught.value.what.replace(f"{path.parent}/", "").splitlines()
    found = [line.strip() for line in lines if not line.startswith("    ")]
    assert count == f"{len(found)} problem{'s' * (len(found) > 1)} in the job"
    return found


@pytest.mark.parametrize(
    ("entry", "case"),
    list(zip(RULES, CASES, strict=True)),
    ids=[f"{n}-{keys[0]}" for n, (keys, _) in enumerate(RULES)],
)
def test_each_rule_is_reported_at_the_key_that_breaks_it(
    entry: tuple[tuple[str, ...], Rule],
    case: tuple[tuple[str, ...], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides, said = case
    path = write(tmp_path, MINIMAL)
    assert any(line.startswith(said) for line in problems(path, *overrides))
    monkeypatch.setattr(check, "RULES", [entry])
    (alone,) = problems(path, *overrides)
    assert alone.startswith(said)


def test_every_key_of_a_rule_is_one_of_the_job() -> None:
    known = {key.replace(".*", "") for key in check.known_keys(Fields)}
    named = {key.replace(".*", "").replace(".<each>", "") for keys, _ in RULES for key in keys}
    assert not named - known


SIX = """\
name: tokens
storage: ftp://host/runs
model:
  base: some/model
  attn_implementation: flash_attention_2
corpus:
  sources:
    a: {path: x, weight: 0.5}
train:
  max_steps: 10
  global_batch_tokens: 1000
  mixed_precision: fp32
quantization: int4
checkpoint:
  save_steps: epoch
"""


def test_faults_between_sections_are_all_reported_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, SIX)
    assert [line.split(": ")[:2] for line in problems(path)] == [
        ["job.yaml:1", "name"],
        ["job.yaml:2", "storage"],
        ["job.yaml:5", "model.attn_implementation"],
        ["job.yaml:7", "corpus.sources"],
        ["job.yaml:11", "train.global_batch_tokens"],
        ["job.yaml:13", "quantization"],
        ["job.yaml:15", "checkpoint.save_steps"],
    ]


def test_wrong_fields_hide_no_rule_of_others(tmp_path: Path) -> None:
    """In the same section, in another item of a mapping, and a whole section that is missing."""
    text = SIX.replace("max_steps: 10", "max_steps: 10\n  lr: fast").replace(
        "    a:", "    b: {weight: .5}\n    a:"
    )
    told = problems(write(tmp_path, text))
    assert len(told) == 8
    assert any("train.lr: Input should be a valid number" in line for line in told)
    assert any("corpus.sources.b.path: Field required" in line for line in told)
    assert not any("weights add up" in line for line in told)
    without = text.replace("train:", "trian:").replace("weight: .5", "weight: 0.1")
    told = problems(write(tmp_path, without))
    assert any("trian: unknown key; did you mean train?" in line for line in told)
    assert any("corpus.sources: the weights add up to 0.6" in line for line in told)
    assert any("quantization: int4 needs an adapter" in line for line in told)
    assert not any("exactly one of max_steps" in line for line in told)


def test_a_wrong_field_hides_the_rules_on_itself_alone(tmp_path: Path) -> None:
    both = write(
        tmp_path, MINIMAL + "stages: [{block_size: 2, max_tokens: 1e5}, {block_size: 96, max_tokens: 9}]\n"
    )
    told = problems(both, "train.global_batch_tokens=128")
    assert [line.split(": ")[1] for line in told] == [
        "train.max_tokens",
        "stages.0.block_size",
        "stages.1.block_size",
    ]
    told = problems(write(tmp_path, MINIMAL), "train.max_tokens=-1", "train.epochs=1", "name=tokens")
    assert [line.split(": ")[1] for line in told] == ["train.max_tokens", "name"]


def test_searched_values_are_checked_in_a_job_with_other_faults(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    search = "tune={search: {train.lr: {choice: [1e-3, -1]}, storage: {choice: [a]}}, trials: 2}"
    told = problems(path, search, "name=tokens", "train.weight_decay=-1")
    assert len(told) == 4
    assert any(
        line.startswith("--set tune: train.lr: ") and line.endswith("not -1 (searched: -1)") for line in told
    )


def test_an_override_is_the_place_of_all_that_it_writes(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "adapter: {r: 2}\n")
    (told,) = problems(path, "train={max_steps: 1, epochs: 1}")
    assert told.startswith("--set train: train.max_steps: give exactly one")
    (told,) = problems(path, "packing.strategie=concat")
    assert told.startswith("--set packing.strategie: packing.strategie: unknown key; did you mean strategy?")


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [(name, s) for name in ("adamw_8bit", "adafactor", "muon") for s in ("fsdp", "zero")],
)
def test_an_optimizer_that_a_strategy_cannot_shard_is_refused(
    tmp_path: Path, optimizer: str, strategy: str
) -> None:
    stage = ("strategy.stage=1",) if strategy == "zero" else ()
    overrides = (f"train.optimizer.name={optimizer}", f"strategy.name={strategy}", *stage)
    path = write(tmp_path, MINIMAL)
    if (optimizer, strategy) == ("muon", "fsdp"):
        assert load_job(path, overrides).train.optimizer.name == "muon"
    else:
        (told,) = problems(path, *overrides)
        assert f"{optimizer} does not work under strategy {strategy}: " in told and "; take ddp" in told


def test_an_optimizer_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("1000", "1000, optimizer: muon"))
    more = "train.optimizer.betas=[0.9, 0.95]"
    optimizer = load_job(path, (more,)).train.optimizer
    assert (optimizer.name, optimizer.betas) == ("muon", (0.9, 0.95))
    (told,) = problems(path, "train.optimizer=adamw_torch")
    assert told.startswith("--set train.optimizer: train.optimizer: Input should be 'adamw', 'adamw_8bit'")
    (told,) = problems(path, "train.optimizer.betas=[0.9, 1]")
    assert told.startswith(
        "--set train.optimizer.betas: train.optimizer.betas.1: Input should be less than 1"
    )


# --- workers


@pytest.mark.parametrize(
    ("workers", "train", "said"),
    [
        ("[3, 2]", "max_tokens: 1000", "the range [3, 2] is inverted: 3 is more than 2"),
        ("[0, 2]", "max_tokens: 1000", "the range [0, 2] leaves 1 to 1,048,576 workers"),
        ("[1, 2, 3]", "max_tokens: 1000", "a number of workers, or [least, most], not [1, 2, 3]"),
        ("[1, two]", "max_tokens: 1000", "a number of workers, or [least, most], not [1, 'two']"),
        ("[2, 40]", "max_tokens: 1000", "a step has 32 sequences (train.global_batch_size): 8 workers would"),
        ("[2, 9]", "max_steps: 1, global_batch_size: 8", "take at most 8, or a larger global batch"),
        (
            "[2, 9]",
            "max_steps: 1, global_batch_tokens: 8192",
            "8 sequences (8,192 tokens in blocks of 1,024)",
        ),
    ],
)
def test_a_range_that_cannot_work_is_refused_with_its_numbers(
    tmp_path: Path, workers: str, train: str, said: str
) -> None:
    text = f"{MINIMAL.replace('max_tokens: 1000', train)}scaling:\n  num_workers: {workers}\n"
    (told,) = problems(write(tmp_path, text))
    line = text.splitlines().index(f"  num_workers: {workers}") + 1
    assert told.startswith(f"job.yaml:{line}: scaling.num_workers: ") and said in told


def test_a_range_is_kept_as_it_is_written(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL), ("scaling.num_workers=[2, 8]",))
    assert (job.scaling.least, job.scaling.most, job.scaling.elastic) == (2, 8, True)
    assert build_job(yaml.safe_load(job_yaml(job))) == job
    for fixed in ("3", "[3, 3]"):
        job = load_job(write(tmp_path, MINIMAL), (f"scaling.num_workers={fixed}",))
        assert (job.scaling.num_workers, job.scaling.elastic) == (3, False)
    assert load_job(write(tmp_path, MINIMAL), ("scaling.num_workers=99",)).scaling.most == 99, "as ever"


# --- from Python


def test_python_gets_the_same_error_as_yaml() -> None:
    values = {**yaml.safe_load(SIX), "seeed": 1, "learning_rate": 1e-3}
    told = []
    for make in (lambda: Job(**values), lambda: Job.model_validate(values), lambda: build_job(values)):
        with pytest.raises(JobError) as caught:
            make()
        told.append(str(caught.value))
        assert str(pickle.loads(pickle.dumps(caught.value))) == told[-1]
    assert len(set(told)) == 1
    assert told[0].startswith("9 problems in the job\n")
    assert "job: seeed: unknown key; did you mean seed?" in told[0]
    assert "job: quantization: int4 needs an adapter" in told[0]


@pytest.mark.parametrize("given", [None, 3, [], {1: 2}, {"train": 3}, {"corpus": {"sources": {1: 2}}}])
def test_what_is_no_job_at_all_is_a_job_error(given: Any) -> None:
    with pytest.raises(JobError, match="in the job") as caught:
        Job.model_validate(given)
    assert "Fields" not in str(caught.value)


def test_sections_made_in_python_are_checked_together() -> None:
    parts: dict[str, Any] = {"name": "x", "model": {"base": "b"}, "corpus": {"sources": {"a": {"path": "p"}}}}
    job = Job(**parts, train=Train(max_steps=1), packing=Packing(block_size=64))
    assert job == build_job({**parts, "train": {"max_steps": 1}, "packing": {"block_size": 64}})
    assert pickle.loads(pickle.dumps(job)) == job == Job.model_validate(job)
    assert build_job(yaml.safe_load(job_yaml(job))) == job == Job.model_validate_json(job.model_dump_json())
    with pytest.raises(JobError, match=r"job: train\.max_steps: give exactly one"):
        Job(**parts, train=Train(max_steps=1, epochs=1))
    with pytest.raises(JobError, match=r"job: train: give exactly one"):
        Job(**parts, train=Train(lr=1))


# --- keys of other trainers


def test_a_foreign_key_names_a_key_of_the_job() -> None:
    known = {*check.known_keys(Fields)}
    for name, meant in FOREIGN.items():
        assert set(meant.keys) <= known, name
        assert (meant.keys or meant.note) and name not in meant.keys, name


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("learning_rate=1e-4", "its name in a job is train.lr"),
        ("train.learning-rate=1e-4", "its name in a job is train.lr"),
        ("block_size=512", "its name in a job is packing.block_size"),
        ("packing.sequence_len=512", "its name in a job is packing.block_size"),
        (
            "batch_size=8",
            "train.micro_batch_size (per worker; the batch of one optimizer step, over all work",
        ),
        ("micro_batch_size=8", "train.micro_batch_size (per worker;"),
        ("train.gradient_accumulation_steps=8", "train.global_batch_size (sequences per optimizer step"),
        ("model.model_name_or_path=gpt2", "its name in a job is model.base"),
        ("corpus.datasets=[a]", "its name in a job is corpus.sources"),
        ("output_dir=out", "storage (the run's folder is <storage>/<name>)"),
        ("resume_from_checkpoint=true", "unknown key; the same command resumes the run"),
        ("max_steps=10", "it belongs at train.max_steps"),
        ("report_to=[wandb]", "tracking.mlflow or tracking.tensorboard or tracking.wandb"),
        ("load_in_4bit=true", "its name in a job is quantization (int4 or int8"),
        ("optim=adamw_torch", "its name in a job is train.optimizer (adamw, adamw_8bit, adafactor or muon)"),
        ("train.adam_beta2=0.95", "its name in a job is train.optimizer.betas (both, as [0.9, 0.999])"),
        ("torch_compile=true", "its name in a job is train.compile (auto, true or false)"),
        ("train.eps=1e-6", "its name in a job is train.optimizer.eps"),
    ],
)
def test_a_key_of_another_trainer_gets_its_name_here(written: str, said: str, tmp_path: Path) -> None:
    (told,) = problems(write(tmp_path, MINIMAL), written)
    key = written.partition("=")[0]
    assert told.startswith(f"--set {key}: {key}: unknown key; ") and said in told


def test_a_key_under_another_name_is_not_missed_too(tmp_path: Path) -> None:
    """Its section lacks a length, since that stands under a foreign name: one problem, not two."""
    (told,) = problems(write(tmp_path, MINIMAL.replace("max_tokens: 1000", "num_train_epochs: 1")))
    assert told == "job.yaml:4: train.num_train_epochs: unknown key; its name in a job is train.epochs"
