"""What `raydist plan` says, against what is then kept, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydist.cli import show
from raydist.errors import ModelError
from raydist.job.plan import make_plan
from raydist.job.schema import Job
from raydist.model.build import build_model, load_config, model_sizes
from raydist.model.kept import kept_for_backward
from raydist.model.loss import autocast, loss_of
from raydist.parallel.footprint import worker_memory
from raydist.run.calibrate import _batch, measure
from raydist.run.estimate import plan_job, plan_sweep
from tests.train_parts import LLAMA, VOCABULARY, make_job, write_tokenizer
from tests.unit.model.test_adapter import write_base
from tests.unit.sweep.test_suggest import sweep

BLOCK = 64


def kept_by_autograd(model: nn.Module, job: Job, rows: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = _batch(make_plan(job, 1, None), VOCABULARY)
    batch = {name: tensor[:1].expand(rows, -1) for name, tensor in batch.items()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(torch.device("cpu"), job.train.mixed_precision),
    ):
        loss_of(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_what_the_layers_keep_is_foreseen(tmp_path: Path, precision: str, rows: int) -> None:
    tokenizer = write_tokenizer(tmp_path / "words")
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
    job = make_job(
        tmp_path,
        model={"config": config},
        packing={"block_size": BLOCK},
        train={"micro_batch_size": rows, "mixed_precision": precision},
    )
    sizes = model_sizes(load_config(job, VOCABULARY), job)
    kept = kept_for_backward(sizes.model, job, sizes.layers, BLOCK)
    assert kept is not None
    planned = kept.copies + rows * BLOCK * (sizes.layers * kept.layer + kept.around)
    model = build_model(job, tokenizer, torch.device("cpu"))
    assert planned == pytest.approx(kept_by_autograd(model, job, rows), rel=0.1)


def test_recomputed_layers_keep_less_and_a_process_counts_on_cpu(tmp_path: Path) -> None:
    def activations(which: Any) -> int:
        model = {"config": {**LLAMA, "num_hidden_layers": 6}}
        job = make_job(tmp_path, model=model, train={"gradient_checkpointing": which})
        sizes = model_sizes(load_config(job, VOCABULARY), job)
        plan = make_plan(job, 1, None)
        here, there = worker_memory(job, plan, sizes, on_cpu=True), worker_memory(job, plan, sizes)
        own = here["process"] + here["checkpoint_copy"]
        assert here["total"] - own == there["total"] and "process" not in there
        assert here["checkpoint_copy"] == there["checkpoint_copy_in_host_memory"]
        return there["activations"]

    none, selective, second, every = map(activations, (False, "selective", 2, True))
    assert every < second < none and every < selective < none


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9\n" * 40)
    (tmp_path / "b.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9\n" * 10)
    write_tokenizer(tmp_path / "words")
    return {
        "sources": {
            name: {"path": str(tmp_path / f"{name}.txt"), "format": "text", "weight": weight}
            for name, weight in (("a", 0.5), ("b", 0.5))
        },
        "holdout": 0.0,
    }


def test_epochs_are_said_for_each_source_and_time_if_it_is_measured(
    tmp_path: Path, corpus: dict[str, Any]
) -> None:
    job = make_job(
        tmp_path,
        model={"tokenizer": str(tmp_path / "words")},
        corpus=corpus,
        train={"max_steps": 9, "global_batch_size": 4},
        scaling={"num_workers": 2},
    )
    planned = plan_job(job)
    for source in planned["data"]["sources"].values():  # half of what is read; each document has an EOS
        once = source["tokens"] + source["documents"]
        assert source["epochs"] == pytest.approx(9 * 4 * 32 / 2 / once)
    found = measure(job, make_plan(job, 2, None))
    assert found["seconds"] == pytest.approx(9 * found["seconds_per_step"]) and found["seconds"] > 0
    assert found["memory_bytes"] > 10**8


def test_a_range_of_workers_is_planned_at_both_ends(
    tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, train = {"tokenizer": str(tmp_path / "words")}, {"global_batch_size": 8, "micro_batch_size": 2}
    sections = {"model": model, "corpus": corpus, "train": train, "strategy": {"name": "fsdp"}}
    one, four = (plan_job(make_job(tmp_path, **sections, scaling={"num_workers": n})) for n in (1, 4))
    both = plan_job(make_job(tmp_path, **sections, scaling={"num_workers": [1, 4]}))
    assert both.pop("least") == {
        "workers": 1,
        "micro_batch_size": 2,
        "accumulation_steps": 4,
        "memory_per_worker_bytes": one["memory_per_worker_bytes"],
    }
    assert both == four and "least" not in one
    show.planned(plan_job(make_job(tmp_path, **sections, scaling={"num_workers": [1, 4]})))
    told = capsys.readouterr().out
    assert "on 4 workers: 1 micro batches of 2" in told
    assert "on 1 worker, the least: 4 micro batches of 2 sequences each; memory per worker: " in told


def test_an_adapter_takes_its_own_size_on_disk(tmp_path: Path, corpus: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options, vocab_size=VOCABULARY, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = {"base": str(tmp_path / "base"), "tokenizer": str(tmp_path / "words"), "config": None}
    shared: dict[str, Any] = {"model": base, "corpus": corpus}
    whole, adapter = (
        plan_job(make_job(tmp_path, **shared)),
        plan_job(make_job(tmp_path, **shared, adapter={"r": 4})),
    )
    assert whole["disk_bytes"]["model"] == 2 * whole["parameters"]["total"]
    assert adapter["disk_bytes"]["model"] == 4 * adapter["parameters"]["trainable"]
    assert adapter["parameters"]["trainable"] < adapter["parameters"]["total"]


def test_a_sweep_is_planned_by_the_ends_of_what_it_searches(tmp_path: Path, corpus: dict[str, Any]) -> None:
    search = {"packing.block_size": {"choice": [32, 64]}, "train.lr": {"loguniform": [1e-4, 1e-2]}}
    values = sweep(search, trials=7).model_dump(mode="json")
    values["corpus"] = corpus
    values["model"] = {"config": LLAMA, "tokenizer": str(tmp_path / "words")}
    values["train"] |= {"max_tokens": 4096.0, "global_batch_tokens": 256}
    values["packing"]["block_size"] = 32
    planned = plan_sweep(Job.model_validate(values))
    assert planned["trials"] == 7 and planned["tokens_at_most"] == 7 * 4096
    sizes = [planned[which]["steps"]["stages"][0]["block_size"] for which in ("first", "last")]
    assert sizes == [32, 64] and planned["searched"]["train.lr"] == [1e-4, 1e-2]


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused_by_the_plan(tmp_path: Path) -> None:
    """The base's own may be it: tokens were added to it, and the model did not grow."""
    base = write_base(tmp_path / "base", LLAMA)
    write_tokenizer(base, "new")
    (tmp_path / "text.jsonl").write_text('{"text": "w2 w3 new w4"}\n' * 9)
    sources = {"text": {"path": str(tmp_path / "text.jsonl")}}
    model = {"base": str(base), "config": None, "tokenizer": None}
    with pytest.raises(ModelError, match="65 tokens and the model embeds 64") as refused:
        plan_job(make_job(tmp_path, model=model, corpus={"sources": sources}))
    assert "model.add_tokens" in refused.value.fix
    grown = make_job(tmp_path, model={**model, "add_tokens": str(base)}, corpus={"sources": sources})
    plain = make_job(
        tmp_path, model={**model, "tokenizer": str(tmp_path / "words")}, corpus={"sources": sources}
    )
    write_tokenizer(tmp_path / "words")
    more = [plan_job(job)["parameters"]["total"] for job in (grown, plain)]
    assert more[0] - more[1] == 2 * LLAMA["hidden_size"]  # a row of the embedding, and one of the head
