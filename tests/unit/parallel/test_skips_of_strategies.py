"""A step that guards refuse changes no bit, under any strategy; the way back to a checkpoint is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raydist.files import read_json, read_jsonl
from tests.train_parts import losses
from tests.unit.parallel.matrix import name_of
from tests.unit.parallel.skipping import CASES, STEPS, run_skipping
from tests.unit.parallel.test_strategies import on_ranks


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_ranks(tmp_path_factory.mktemp("skipping"), run_skipping)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs all
@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_refused_steps_change_nothing_and_lead_back(skipping: Path, case: tuple[str, str, str]) -> None:
    folder = skipping / name_of(case)
    failed = folder / "error.txt"
    assert not failed.exists(), failed.read_text()
    ranks: list[list[dict[str, Any]]] = [read_json(folder / f"found-{rank}.json") for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    found = dict(enumerate(ranks[0], start=1))
    assert [each["taken"] for each in found.values()] == [True] * 3 + [False] * 3 + [True] * 3
    assert [each["in_a_row"] for each in found.values()] == [0, 0, 0, 1, 2, 0, 0, 0, 0]
    assert [each["optimizer_steps"] for each in found.values()] == [[n] for n in (1, 2, 3, 3, 3, 2, 3, 4, 5)]
    states = {step: each["state"] for step, each in found.items()}
    assert states[3] == states[4] == states[5] != states[2]
    assert states[6] == states[2]
    assert len({*states.values()}) == STEPS - 3
    assert [each["samples"] for each in found.values()] == [5 * step for step in found]
    assert [found[step]["skipped"] for step in (3, 5, 6, 9)] == [
        [0, []],
        [2, [[15, 25]]],
        [4, [[10, 30]]],
        [4, [[10, 30]]],
    ]
    assert found[6]["tokens"] == found[2]["tokens"]
    records = read_jsonl(folder / "run" / "metrics.jsonl")
    skips = [record for record in records if record["kind"] == "skip"]
    assert [(r["step"], r["action"]) for r in skips] == [(4, "skipped"), (5, "skipped"), (6, "rolled back")]
    with_ddp = skipping / name_of(CASES[0]) / "run"
    within = 1e-5 if case[2] == "fp32" else 5e-3
    assert losses(folder / "run") == pytest.approx(losses(with_ddp), rel=within)  # also after the way back
    of_ddp = [record for record in read_jsonl(with_ddp / "metrics.jsonl") if record["kind"] == "skip"]
    for own, others in zip(skips, of_ddp, strict=True):
        named, expected = ({(d["file"], d["row"]): d["loss"] for d in r["documents"]} for r in (own, others))
        assert named == pytest.approx(expected, rel=within)
        assert own["grad_norm"] == pytest.approx(others["grad_norm"], rel=2e-2)
