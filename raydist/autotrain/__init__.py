"""AutoTrain's default trainer of language models, by its own parameters, run as a raydist job.

>>> from raydist.autotrain import LLMTrainingParams, train          # doctest: +SKIP
>>> model = train(LLMTrainingParams(model="gpt2", ...))             # doctest: +SKIP

    parameters -> table -> job -> run -> project folder -> (hub)

The names are imported when they are first used, so that the command line stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydist.autotrain.params import LLMTrainingParams
    from raydist.autotrain.project import train

__all__ = ["LLMTrainingParams", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module raydist.autotrain has no attribute {name}")
    home = {"LLMTrainingParams": "params", "train": "project"}[name]
    return getattr(import_module(f"raydist.autotrain.{home}"), name)
