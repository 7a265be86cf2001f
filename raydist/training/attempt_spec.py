"""What one attempt at training needs to know; picklable, and the same on every rank."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from raydist.job.plan import Plan, StagePlan
from raydist.job.schema import Job


@dataclass(frozen=True)
class AttemptSpec:
    """run: the run's folder.  logs, eval_logs: token logs by source.  tokenizer: a Hugging Face folder.

    attempt counts from 1 over the life of the run.  growing: the logs to train on are still being made.
    """

    job: Job
    run: Path
    logs: dict[str, Path]
    tokenizer: Path
    plan: Plan
    attempt: int = 1
    eval_logs: dict[str, Path] = field(default_factory=dict)
    growing: bool = False

    def to_json(self) -> str:
        return json.dumps(
            {
                "job": self.job.model_dump(mode="json"),
                "run": str(self.run),
                "logs": {name: str(path) for name, path in self.logs.items()},
                "tokenizer": str(self.tokenizer),
                "plan": asdict(self.plan),
                "attempt": self.attempt,
                "eval_logs": {name: str(path) for name, path in self.eval_logs.items()},
                "growing": self.growing,
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> AttemptSpec:
        raw = json.loads(text)
        return cls(
            job=Job.model_validate(raw["job"]),
            run=Path(raw["run"]),
            logs={name: Path(path) for name, path in raw["logs"].items()},
            tokenizer=Path(raw["tokenizer"]),
            plan=Plan(**{**raw["plan"], "stages": tuple(StagePlan(**of) for of in raw["plan"]["stages"])}),
            attempt=raw["attempt"],
            eval_logs={name: Path(path) for name, path in raw["eval_logs"].items()},
            growing=raw["growing"],
        )
