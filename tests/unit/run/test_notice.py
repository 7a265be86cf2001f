"""What a driver does when a node of its run is about to be taken away."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from raydist.folder import RunFolder
from raydist.run.notice import NoticeWatch
from raydist.training.beat import beating
from raydist.training.commit_request import asked
from raydist.training.phases import Phases


def test_a_notice_leads_to_a_checkpoint_at_once_and_one_before_the_node_goes(tmp_path: Path) -> None:
    folder, said, now = RunFolder(tmp_path), [], 1000.0
    here = socket.gethostname()
    going: dict[str, float] = {"another": 1030.0}
    watch = NoticeWatch(folder, 1, said.append, hosts=lambda: going, clock=lambda: now)

    def at(time: float) -> str:
        nonlocal now
        now = time
        watch.look()
        return asked(folder, 1)

    def commit(step: int) -> None:
        record: Any = {"kind": "commit", "step": step}
        watch.record(record)

    with beating(folder.ranks(1), 0, Phases("steps")):
        while not list(folder.ranks(1).glob("rank-*.json")):
            os.sched_yield()
        assert at(1003.0) == "" and not said  # none of the run's nodes
        going[here] = 1120.0
        commit(3)
        first = at(1006.0)
        assert first and said == [f"{here} will be taken away in 114 s: a checkpoint is made now"]
        assert at(1009.0) == first
        now = 1016.0
        commit(5)
        assert said[1] == "the checkpoint of step 5 counts, 10.0 s after it was asked for"
        assert at(1099.0) == first  # 5 s, and 1.5 times those 10
        second = at(1101.0)
        assert second not in ("", first) and "about to be taken away" in said[2]
        assert at(1110.0) == second and len(said) == 3
