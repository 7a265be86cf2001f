"""The strategies: the same losses as DDP, the same state whoever saved it, and what is refused."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from raydist.errors import CheckpointError, JobError
from raydist.files import measure, read_json, read_jsonl
from raydist.folder import RunFolder
from raydist.job.load import build_job
from raydist.job.schema import Job
from raydist.training import checkpoint
from raydist.training.attempt_spec import AttemptSpec
from raydist.training.loop import train
from tests.train_parts import (
    LLAMA,
    VOCABULARY,
    finish,
    fork_ranks,
    losses,
    make_job,
    make_spec,
    run_ranks,
    start_ranks,
    write_log,
    write_tokenizer,
)
from tests.unit.parallel.matrix import (
    CASES,
    METHODS,
    QUICK,
    STRATEGIES,
    WITHIN,
    name_of,
    run_matrix,
)
from tests.unit.parallel.replicated import CASES as REPLICATED
from tests.unit.parallel.replicated import run_replicated
from tests.weights import weight_hash

FIVE = ("ddp", "fsdp", "zero-1", "zero-2", "zero-3")
TIED = {"config": {**LLAMA, "tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AttemptSpec]:
    """12 steps on two ranks in fp32, accumulated, clipped, with tied embeddings, by each strategy."""
    folder, specs = tmp_path_factory.mktemp("undisturbed"), {}
    for name in STRATEGIES:
        spec = make_spec(
            folder,
            world_size=2,
            run=name,
            model=TIED,
            strategy=STRATEGIES[name],
            train={"max_steps": 12, "global_batch_size": 5},
        )
        assert spec.plan.accumulation_steps == 3
        run_ranks(spec)
        specs[name] = spec
    return specs


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "ddp"])
def test_loss_for_loss_it_is_ddp(undisturbed: dict[str, AttemptSpec], name: str) -> None:
    expected, found = (losses(undisturbed[n].run) for n in ("ddp", name))
    assert len(found) == 12 and found[12] < 0.9 * found[1]
    assert found == pytest.approx(expected, rel=1e-5)
    norms, of_ddp = (
        [r["grad_norm"] for r in read_jsonl(undisturbed[n].run / "metrics.jsonl") if r["kind"] == "train"]
        for n in (name, "ddp")
    )
    assert norms == pytest.approx(of_ddp, rel=1e-4) and max(norms) > 0.5  # or nothing was clipped


@pytest.mark.parametrize("name", FIVE)
def test_killed_and_resumed_it_ends_as_undisturbed(undisturbed: dict[str, AttemptSpec], name: str) -> None:
    whole = undisturbed[name]
    cut = replace(whole, run=whole.run.with_name(f"killed-{name}"))
    ranks = start_ranks(cut)
    while 7 not in losses(cut.run) or not RunFolder(cut.run).committed():
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
    assert [rank.wait(30) for rank in ranks] == [-9, -9]
    left = checkpoint.newest_valid(RunFolder(cut.run))
    assert left is not None and left.step in (5, 10)
    run_ranks(replace(cut, attempt=2))
    assert losses(cut.run) == losses(whole.run)
    assert weight_hash(cut.run / "model") == weight_hash(whole.run / "model")


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "ddp"])
def test_it_goes_on_from_what_ddp_saved(undisturbed: dict[str, AttemptSpec], name: str) -> None:
    """The strategy is no part of a run's identity: a run that outgrows DDP goes on under another."""
    ddp, own = undisturbed["ddp"], undisturbed[name]
    went_on = replace(own, run=own.run.with_name(f"on-{name}"), attempt=2)
    shutil.copytree(ddp.run, went_on.run)
    for step in (10, 12):
        shutil.rmtree(RunFolder(went_on.run).checkpoint(step))
    run_ranks(went_on)
    assert losses(went_on.run) == pytest.approx(losses(ddp.run), rel=1e-5)
    starts = [r["step"] for r in read_jsonl(went_on.run / "metrics.jsonl") if r["kind"] == "resume"]
    assert starts == [5]


@pytest.mark.parametrize("name", ["fsdp", "zero-3"])
def test_a_rank_holds_and_writes_its_share(undisturbed: dict[str, AttemptSpec], name: str) -> None:
    commit = checkpoint.newest_valid(RunFolder(undisturbed[name].run))
    assert commit is not None and commit.files is not None
    sizes = [file["size"] for file in commit.files.values()]
    assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)
    exported = AutoModelForCausalLM.from_pretrained(undisturbed[name].run / "model")
    assert exported.config.architectures == ["LlamaForCausalLM"]
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


def test_a_checkpoint_of_plain_files_by_name_is_read_as_well(tmp_path: Path) -> None:
    """So were those of raydist 0.1: two files, and a step count for each tensor."""
    from safetensors.torch import save_file

    spec = make_spec(tmp_path)
    train(spec)
    shutil.rmtree(spec.run / "model")
    shutil.rmtree(RunFolder(spec.run).checkpoint(20))
    folder = RunFolder(spec.run).checkpoint(15)
    (stored,) = folder.glob("*.safetensors")
    with safe_open(stored, "pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    stored.unlink()
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("exp_avg")}
    moments = {name: tensor for name, tensor in state.items() if name.startswith("exp_avg")}
    save_file(weights, folder / "weights.safetensors")
    save_file(
        {**moments, **{f"step.{n}": torch.tensor(15.0) for n in weights}}, folder / "optimizer.safetensors"
    )
    raw = read_json(folder / "COMMIT.json")
    raw["files"] = {p.name: measure(p) for p in folder.glob("*.safetensors")}
    del raw["checksum"], raw["line"]
    (folder / "COMMIT.json").write_text(json.dumps(raw))
    before = losses(spec.run)
    train(replace(spec, attempt=2))
    assert losses(spec.run) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, train={"max_steps": 5})
    train(spec)
    wider = make_spec(
        tmp_path, train={"max_steps": 5}, model={"config": {**LLAMA, "hidden_size": 64}}, attempt=2
    )
    with pytest.raises(CheckpointError, match=r"do not fit the model, the first is lm_head\.weight"):
        train(wider)


# --- the matrix: docs/support.md is made of it


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of the matrix that runs in every test, with what the rest is compared with."""
    return on_ranks(tmp_path_factory.mktemp("matrix"), run_matrix, "quick")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_ranks(tmp_path_factory.mktemp("matrix"), run_matrix, "rest")


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_ranks(tmp_path_factory.mktemp("replicated"), run_replicated)


def on_ranks(folder: Path, run: Callable[..., None], *more: str, made: bool = False) -> Path:
    """Run once for all: on two ranks in forked processes, then alone from what the two had saved.

    made: token log, tokenizer and base are in `folder`.
    """
    if not made:
        parts(folder)
    work = folder / "work.pickle"
    work.write_bytes(pickle.dumps(functools.partial(run, folder, *more)))
    for n_ranks in (2, 1):
        finish(fork_ranks(work, n_ranks), seconds=400)
    return folder


def parts(folder: Path) -> Path:
    """The token log, tokenizers and bases of `spec_of`."""
    write_log(folder / "tokens" / "log")
    write_tokenizer(folder / "words")
    write_tokenizer(folder / "more", "new1", "new2")
    config = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": VOCABULARY}
    for name, tied in (("base", False), ("tied", True)):
        torch.manual_seed(1)
        made = AutoConfig.for_model("llama", **config, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(made).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


@pytest.fixture
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return found_in(request.getfixturevalue("quick" if request.param in QUICK else "rest"), request.param)


def found_in(folder: Path, case: tuple[str, str, str]) -> dict[str, Any]:
    folder /= name_of(case)
    failed = folder / "error.txt"
    assert not failed.exists(), failed.read_text()
    return {**read_json(folder / "found.json"), "alone": read_json(folder / "alone.json")["losses"]}


@pytest.mark.timeout(900)  # the first of them runs the matrix
@pytest.mark.parametrize(
    ("case", "found"),
    [pytest.param(c, c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
    ids=map(name_of, CASES),
    indirect=["found"],
)
def test_it_trains_resumes_exports_and_merges(
    case: tuple[str, str, str], found: dict[str, Any], quick: Path
) -> None:
    """Against DDP; resumed at 2 ranks and at 1; its model, and merged, by plain transformers or peft."""
    judge(case, found, quick)


def judge(case: tuple[str, str, str], found: dict[str, Any], quick: Path) -> None:
    within = {what: limits[case[2]] for what, limits in WITHIN.items()}
    of_ddp = read_json(quick / name_of(("ddp", *case[1:])) / "found.json")["losses"]
    assert found["losses"] == pytest.approx(of_ddp, rel=within["losses as DDP's"])
    assert found["losses"][-1] < found["losses"][0]
    again = within["resumed with as many workers"]
    assert found["losses_of_cut"] == pytest.approx(found["losses"], rel=again, abs=0)
    assert again > 0 or len(set(found["hashes"])) == 1
    assert found["alone"] == pytest.approx(found["losses"], rel=within["resumed with one worker of two"])
    loaded = within["model/ loaded by transformers or peft"]
    assert found["loaded"] == pytest.approx(found["trained"], rel=loaded)
    assert ("merged" in found) == (case[1] != "full")
    merged = found.get("merged", found["loaded"])
    assert merged == pytest.approx(found["loaded"], rel=within["the adapter merged"])


@pytest.mark.parametrize("case", REPLICATED, ids=name_of)
def test_ddp_as_gpus_have_it_is_ddp(case: tuple[str, str, str], replicated: Path, quick: Path) -> None:
    judge(case, found_in(replicated, case), quick)


def test_the_matrix_has_every_strategy_that_the_schema_has() -> None:
    strategy = Job.model_json_schema()["$defs"]["Strategy"]["properties"]
    assert {s["name"] for s in STRATEGIES.values()} == set(strategy["name"]["enum"])
    stages = strategy["stage"]["anyOf"][0]["enum"]
    assert {(s.get("stage"), s.get("offload")) for s in STRATEGIES.values()} == {
        (None, None),
        *((stage, offload) for stage in stages for offload in (None, "cpu")),
    }
    assert set(METHODS) - {"full", "lora", "grown"} == set(
        Job.model_json_schema()["properties"]["quantization"]["anyOf"][0]["enum"]
    )


# --- bad input


def strategy(**values: Any) -> Job:
    plain = make_job(Path("runs")).model_dump(mode="json")
    return build_job({**plain, "strategy": values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "zero", "stage": 4}, r"strategy\.stage: Input should be 1, 2 or 3, not 4"),
        ({"name": "zero"}, "needs stage: 1, 2 or 3"),
        ({"name": "fsdp", "stage": 2}, "name: fsdp has no stage"),
        ({"name": "ddp", "offload": "cpu"}, "name: ddp has no offload"),
        ({"name": "deepspeed"}, "'ddp', 'fsdp' or 'zero', not 'deepspeed'"),
        ({"name": "zero", "stage": 2, "config": "no.json"}, r"no\.json cannot be read: .*No such file"),
    ],
)
def test_a_strategy_that_does_not_exist_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        strategy(**values)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"train_batch_size": 8}, r"train_batch_size: 8, .* train\.global_batch_size"),
        (
            {"gradient_clipping": 2.0},
            r"gradient_clipping: 2\.0, .* train\.max_grad_norm \(which gives 0\.5\)",
        ),
        ({"optimizer": {"type": "Adam"}}, r"optimizer: .* train\.lr and train\.weight_decay"),
        ({"fp16": {"enabled": True}}, r"fp16: .* train\.mixed_precision"),
        (
            {"bf16": {"enabled": True}},
            r"bf16\.enabled: True, .* train\.mixed_precision \(which gives False\)",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            r"zero_optimization\.stage: 3, .* strategy\.stage \(which gives 2\)",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer\.device: 'nvme', .* strategy\.offload",
        ),
        ({"zero_optimisation": {}}, r"zero_optimisation: raydist does not use this key"),
    ],
)
def test_a_deepspeed_key_that_contradicts_the_job_is_refused_by_name(own: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        strategy(name="zero", stage=2, config=own)


def test_deepspeed_gets_fp16_as_autocast_and_leaves_its_scale_to_raydist() -> None:
    half = {"train": {"mixed_precision": "fp16"}, "strategy": {"name": "zero", "stage": 2}}
    given = make_job(Path("runs"), **half).deepspeed()
    assert given["torch_autocast"] == {
        "enabled": True,
        "dtype": "float16",
        "lower_precision_safe_modules": [],
    }
    assert "fp16" not in given
    half["strategy"]["config"] = {"fp16": {"enabled": True, "loss_scale": 128}}
    with pytest.raises(JobError, match=r"fp16\.loss_scale: 128, but the job decides this by"):
        make_job(Path("runs"), **half)


def test_a_deepspeed_file_is_merged_where_it_does_not_fight(tmp_path: Path) -> None:
    """Such as Hugging Face's examples: "auto" leaves a key to the job, and so does a section that is off."""
    own = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"pin_memory": True},
        },
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "steps_per_print": 7,
    }
    (tmp_path / "ds.json").write_text(json.dumps(own))
    job = strategy(name="zero", stage=2, config=str(tmp_path / "ds.json"))
    (tmp_path / "ds.json").unlink()
    merged = build_job(job.model_dump(mode="json")).deepspeed()  # as the run's job.yaml is read again
    assert merged["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 2**25,
        "offload_optimizer": {"device": "none", "pin_memory": True},
    }
    assert (merged["gradient_clipping"], merged["steps_per_print"]) == (0.5, 7)
    assert "train_batch_size" not in merged and "fp16" not in merged
