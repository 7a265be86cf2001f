"""Families of models trained, resumed, exported and merged, under strategies of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from raydist.files import read_jsonl
from tests.families import FAMILIES, write_base
from tests.train_parts import make_spec, run_ranks, write_log, write_tokenizer
from tests.unit.parallel.matrix import Case, families_of, name_of, run_families
from tests.unit.parallel.test_strategies import found_in, judge, on_ranks


def bases(folder: Path, family: str) -> Path:
    write_log(folder / "tokens" / "log")
    write_tokenizer(folder / "words")
    write_base(family, folder / "base")
    write_tokenizer(folder / "base")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """All cases of a family, run when the first of them is asked for."""

    @cache
    def train(family: str) -> Path:
        folder = bases(tmp_path_factory.mktemp("family"), family)
        return on_ranks(folder, run_families, family, made=True)

    return train


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in FAMILIES for case in families_of(family)],
    ids=lambda each: each if isinstance(each, str) else name_of(each),
)
def test_a_family_trains_resumes_exports_and_merges(
    trained: Callable[[str], Path], family: str, case: Case
) -> None:
    judge(case, found_in(trained(family), case), trained(family))


def test_a_routers_loss_weighs_the_same_at_any_number_of_workers(tmp_path: Path) -> None:
    """Four micro batches of one row, in one worker or in two; and it is told apart from the rest."""
    base = write_base("mixtral", tmp_path / "base", output_router_logits=True, router_aux_loss_coef=0.5)
    write_tokenizer(base)
    found = []
    for world_size in (1, 2):
        spec = make_spec(
            tmp_path,
            world_size=world_size,
            run=f"run-{world_size}",
            model={"base": str(base), "config": None, "tokenizer": None},
            train={"max_steps": 3},
        )
        run_ranks(spec)
        found.append([r for r in read_jsonl(spec.run / "metrics.jsonl") if r["kind"] == "train"])
    for alone, two in zip(*found, strict=True):
        assert two["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert two["router_aux_loss"] == pytest.approx(alone["router_aux_loss"], rel=1e-6)
        assert 1.9 < alone["router_aux_loss"] < 4  # top 2 of 4 experts: 2 where they are used alike
        assert 3 < alone["loss"] - 0.5 * alone["router_aux_loss"] < 4.5
