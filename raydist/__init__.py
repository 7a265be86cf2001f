"""raydist: raw files in, a trained Hugging Face model out, on a Ray cluster, from one job file.

>>> from raydist import Job, train           # doctest: +SKIP
>>> result = train(Job(...))                 # doctest: +SKIP
>>> model = result.load_model()              # doctest: +SKIP

The names below are imported when they are first used: `import raydist` loads neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydist.api import blocks, load_job, open_feed, open_log, prepare, submit, train, tune
    from raydist.job.schema import Job
    from raydist.run.run import RunResult
    from raydist.training.hooks import Hook

__all__ = [
    "Hook",
    "Job",
    "RunResult",
    "blocks",
    "load_job",
    "open_feed",
    "open_log",
    "prepare",
    "submit",
    "train",
    "tune",
]


if not TYPE_CHECKING:  # else a type checker would take every name of the module for Any

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module raydist has no attribute {name}")
        return getattr(import_module(_HOMES.get(name, "raydist.api")), name)


_HOMES = {"Hook": "raydist.training.hooks", "Job": "raydist.job.schema", "RunResult": "raydist.run.run"}
