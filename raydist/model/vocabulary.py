"""A base that gets further tokens: its embedding, and its head, with a row for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydist.errors import ModelError, first_line
from raydist.job.schema import Job


def rows_of(model: nn.Module) -> int:
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return rows


@torch.no_grad()
def grow_vocabulary(model: nn.Module, n_tokens: int) -> None:
    """Give the bare `model` rows for ids up to n_tokens - 1, where it has fewer. Rows that it has stay.

    A new row is the mean of the old ones, of the embedding and of the head each: so a new token is about as
    likely as the others are in the mean, and the old ones keep nearly all their probability (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"). transformers would draw rows around
    the mean; the mean itself is the same on every rank. A model on meta gets rows without values.
    Raises ModelError for a model whose embedding cannot grow.
    """
    before = rows_of(model)
    if n_tokens <= before:
        return
    try:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)  # type: ignore[operator]
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the vocabulary of {type(model).__name__} cannot grow",
            where="model.add_tokens",
            why=first_line(error),
            fix="leave model.add_tokens out",
        ) from error
    for weight in _by_token(model, n_tokens):
        if not weight.is_meta:
            weight[before:] = weight[:before].mean(dim=0, dtype=torch.float64).to(weight.dtype)


def _by_token(model: Any, n_tokens: int) -> Iterator[Tensor]:
    """The weights and biases of the embedding and the head, each once, whose rows are tokens."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    for parameter in {p: None for module in modules for p in module.parameters(recurse=False)}:
        if parameter.shape[0] == n_tokens:
            yield parameter.detach()


def check_new_rows_are_trained(model: nn.Module, job: Job) -> None:
    """Raises ModelError where an adapter would leave the rows of new tokens at the mean of the others.

    model: with its adapter, bare or on meta.
    """
    if not job.model.add_tokens or job.adapter is None:
        return
    of_model: Any = model
    kinds = (of_model.get_input_embeddings(), of_model.get_output_embeddings())
    names = {id(module): path.rpartition(".")[2] for path, module in model.named_modules()}
    parts = [module for module in kinds if module is not None]
    frozen = [names[id(m)] for m in parts if not all(p.requires_grad for p in m.parameters())]
    if frozen:
        asked = list(dict.fromkeys([*job.adapter.modules_to_save, *frozen]))
        raise ModelError(
            f"the new tokens' rows in {' and '.join(frozen)} would not be trained",
            where="adapter.modules_to_save",
            why="every new token would stay the same one: the mean of the old tokens",
            fix=f"set adapter.modules_to_save: [{', '.join(asked)}]",
        )


def n_tokens_of(tokenizer_folder: Path) -> int:
    """The highest id of the tokenizer + 1."""
    from raydist.corpus.tokenizer import open_pretrained

    return int(max(open_pretrained(tokenizer_folder).get_vocab().values())) + 1
