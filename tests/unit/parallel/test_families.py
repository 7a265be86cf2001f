"""Families of models trained, resumed, exported and merged, under strategies of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.families import FAMILIES, write_base
from tests.train_parts import write_log, write_tokenizer
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
