"""What fits where: workers are not spread over nodes, and each takes the GPU that it computes on."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.cluster.resources import workers_by_node
from tests.unit.cluster.test_checks import job


@pytest.mark.parametrize(
    ("scaling", "nodes", "fitting"),
    [
        ({}, [{"CPU": 4.0}, {"CPU": 1.0}, {}], [4, 1, 0]),
        ({"cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 8.0}], [1, 2]),
        ({"num_workers": 2}, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], [2, 0]),  # auto: there are enough
        ({"num_workers": 3}, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], [16, 16]),  # auto: there are not
        ({"use_gpu": False}, [{"CPU": 2.0, "GPU": 8.0}], [2]),
        ({"num_workers": 9, "use_gpu": True}, [{"CPU": 2.0, "GPU": 8.0}], [2]),
    ],
)
def test_workers_fit_by_node(
    scaling: dict[str, Any], nodes: list[dict[str, float]], fitting: list[int]
) -> None:
    assert workers_by_node(job(**scaling), nodes) == fitting
