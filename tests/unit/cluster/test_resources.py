"""What fits where: workers are not spread over nodes, and each takes the GPU that it computes on."""

from __future__ import annotations

from typing import Any

import pytest

from raydist.cluster.resources import cpus_per_worker, room, workers_by_node
from raydist.job.plan import sized
from tests.unit.cluster.test_checks import job


@pytest.mark.parametrize(
    ("scaling", "nodes", "fitting"),
    [
        ({"cpus_per_worker": 1}, [{"CPU": 4.0}, {"CPU": 1.0}, {}], [4, 1, 0]),
        ({}, [{"CPU": 4.0}, {"CPU": 1.0}, {}], [1, 0, 0]),
        ({"cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 8.0}], [1, 2]),
        ({"num_workers": 2}, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], [2, 0]),  # auto: there are enough
        ({"num_workers": 3}, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}], [2, 2]),  # auto: there are not
        ({"use_gpu": False, "cpus_per_worker": 1}, [{"CPU": 2.0, "GPU": 8.0}], [2]),
        ({"num_workers": 9, "use_gpu": True}, [{"CPU": 2.0, "GPU": 8.0}], [2]),
    ],
)
def test_workers_fit_by_node(
    scaling: dict[str, Any], nodes: list[dict[str, float]], fitting: list[int]
) -> None:
    assert workers_by_node(job(**scaling), nodes) == fitting


@pytest.mark.parametrize(
    ("scaling", "nodes", "each"),
    [
        ({}, [{"CPU": 1.0}], 1),
        ({}, [{"CPU": 2.0}], 2),
        ({}, [{"CPU": 8.0}], 7),
        ({"num_workers": 2}, [{"CPU": 2.0}], 1),
        ({"num_workers": 2}, [{"CPU": 8.0}], 3),
        ({"num_workers": 9}, [{"CPU": 8.0}], 1),  # they do not fit, which others say
        ({"num_workers": 3}, [{"CPU": 8.0}, {"CPU": 5.0}], 3),
        ({}, [{"CPU": 3.0, "cores": 2.0}], 2),  # an embedded Ray promises more than there is
        ({}, [{"CPU": 2.0, "cores": 1.0}], 1),
        ({}, [{"CPU": 8.0, "GPU": 1.0}], 1),
        ({"cpus_per_worker": 4}, [{"CPU": 2.0}], 4),
        ({}, [], 1),
    ],
)
def test_auto_shares_the_cpus_over_the_workers(
    scaling: dict[str, Any], nodes: list[dict[str, float]], each: int
) -> None:
    assert cpus_per_worker(job(**scaling), nodes) == each


NODE = {"CPU": 4.0, "free CPU": 4.0}


@pytest.mark.parametrize(
    ("scaling", "nodes", "fitting"),
    [
        ({"cpus_per_worker": 2}, [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}], 2),  # not split over nodes
        ({"cpus_per_worker": 1}, [{"CPU": 9.0}, {"CPU": 9.0}], 8),  # the most
        ({}, [{"CPU": 4.0}, {"CPU": 1.0}], 4),  # auto leaves one of four for the data
        ({}, [NODE, {"CPU": 4.0, "free CPU": 1.0}], 4),  # others hold the rest
        ({"cpus_per_worker": 2}, [NODE, {"CPU": 4.0, "free CPU": 1.0}], 2),
        ({}, [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 4.0}], 6),
        ({}, [{"CPU": 16.0, "GPU": 4.0, "free CPU": 16.0, "free GPU": 3.0}], 3),
        ({}, [{"CPU": 3.0, "cores": 2.0}], 2),  # an embedded Ray: what the machine has
        ({}, [{"CPU": 3.0, "cores": 1.0}], 2),  # and the least in any case
        ({}, [], 0),
    ],
)
def test_a_range_takes_what_there_is_room_for(
    scaling: dict[str, Any], nodes: list[dict[str, float]], fitting: int
) -> None:
    asked = job(**{"num_workers": [2, 8], **scaling})
    assert room(asked, nodes) == fitting
    if fitting >= 2:
        assert sum(workers_by_node(sized(asked, fitting), nodes)) >= fitting
