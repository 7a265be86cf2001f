"""A router's own loss, which keeps the experts of a mixture balanced.

Equations 4 to 6 of Fedus et al. 2021, "Switch Transformers" (arXiv:2101.03961), as transformers computes them
from the router logits of all layers. Its Trainer adds it to the loss where a configuration has
output_router_logits, and so does raydist. It is a mean over the tokens of a micro batch, so each counts by
its labels: the step's value has the same weight with any number of micro batches and workers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raydist.errors import JobError
from raydist.model.layers import bare_of, text_config

ROUTED = {"output_router_logits": True}
"""For a forward pass whose router's loss is used."""
_ROUTER = "_raydist_router"


@dataclass
class Router:
    """coefficient: of the loss.  balance: gives that of router logits, a tuple of (B T, experts) by layer.

    seen: what `term` was given since `start`, times its labels.
    """

    coefficient: float
    balance: Callable[[Any], Tensor]
    seen: list[Tensor] = field(default_factory=list)

    def start(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    def term(self, balance: Tensor, labels: Tensor) -> Tensor:
        """What to add to the summed loss of these labels, scalar fp32."""
        weighted = balance.float() * (labels >= 0).sum()
        self.seen.append(weighted.detach())
        return weighted * self.coefficient

    def sum_seen(self) -> float:
        """A GPU is waited for."""
        return float(torch.stack(self.seen).double().sum()) if self.seen else 0.0


def use_router_loss(model: nn.Module, coefficient: float | None) -> float:
    """From now on the loss of the bare `model` has its router's, in training; the coefficient.

    coefficient: None for what the configuration says. Raises JobError where it is given, and the model has no
    such loss.
    """
    asked = _asked_by(model.config) if coefficient is None else coefficient
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    takes = "output_router_logits" in inspect.signature(type(model).forward).parameters
    if function is None or not takes:
        if coefficient:
            raise JobError(
                f"{type(model).__name__} has no loss for its router",
                where="train.router_aux_loss_coef",
                why="transformers computes none for this architecture",
                fix="leave router_aux_loss_coef out",
            )
        return 0.0
    if asked:
        text: Any = text_config(model.config)
        experts = getattr(text, "num_local_experts", None) or text.num_experts
        model.__dict__[_ROUTER] = Router(
            asked, lambda logits: function(logits, experts, text.num_experts_per_tok)
        )
    return asked


def _asked_by(config: Any) -> float:
    text = text_config(config)
    wanted = getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False)
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0) if wanted else 0.0


def router_of(model: nn.Module) -> Router | None:
    """That of the model, bare or wrapped, if its loss is used."""
    router: Router | None = bare_of(model).__dict__.get(_ROUTER)
    return router
