"""The parameters of AutoTrain's default trainer of language models, run as a raydist job.

>>> from raydist.autotrain import LLMTrainingParams, train          # doctest: +SKIP
>>> model = train(LLMTrainingParams(model="gpt2", ...))             # doctest: +SKIP

    keywords, raydist llm ─▶ params ─▶ job ─▶ run ─▶ project: the model in P ─▶ hub
                                 params uses table and data; so does raydist.imports, for config files

    table     every parameter: what it sets in a job, or why it is refused
    params    check the parameters, with every problem in one error, and make the job
    data      the files of a split: local, by URI, or a hub data set
    project   the project's folder P: run the job, link the model into P, upload it

The names below are imported at first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydist.autotrain.params import LLMTrainingParams
    from raydist.autotrain.project import train

__all__ = ["LLMTrainingParams", "train"]


if not TYPE_CHECKING:  # else a type checker would take every name of the module for Any

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module raydist.autotrain has no attribute {name}")
        module = {"LLMTrainingParams": "params", "train": "project"}[name]
        return getattr(import_module(f"raydist.autotrain.{module}"), name)
