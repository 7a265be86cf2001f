"""Numbers and sizes as people read them."""

from __future__ import annotations

import pytest

from raydist.track.humanize import size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (20 * 2**20, "21 MB"),
        (134_217_728, "134 MB"),
        (999_600_000, "1 GB"),
        (1_970_000_000, "1.97 GB"),
        (3_500_000_000_000_000, "3,500 TB"),
    ],
)
def test_sizes_are_decimal_and_have_three_digits(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
