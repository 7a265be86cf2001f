"""The loss of a large vocabulary without its logits: the head and the cross-entropy, some rows at a time.

    hidden (B, T, H) ─▶ rows ─▶ head ─▶ logits of these rows ─▶ loss, gradient of hidden and of the head

The gradient is made along with the loss, as Liger's fused linear cross-entropy does (Hsu et al. 2024,
arXiv:2410.10989), so nothing is computed twice and no logits are kept. What a model does with its logits
behind the head is found by an experiment; where that is not understood, the logits are made whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydist.feed.packing import IGNORED
from raydist.model.cross_entropy import loss_and_gradient, summed_cross_entropy
from raydist.model.layers import bare_of, text_config
from raydist.model.router import router_of

LABELS = "raydist_labels"
"""Given to the forward pass of a model that `use_chunked_head` has seen: it returns the summed loss then."""
BY_TOKEN = "raydist_by_token"  # noqa: S105 - a name, no secret
"""Next to LABELS, and without gradient: the loss of each label, not their sum."""
WORTH_ELEMENTS = 2**26
"""Up to this number (256 MiB in fp32) logits are made whole and kept: that is quicker."""
CHUNKS = 12
"""Parts of a batch that the head sees one after another. With more, adding up its gradient costs more."""
CHUNK_ELEMENTS = 2**28
"""Logits of one part at most: 1 GiB in fp32."""
_HEAD = "_raydist_head"


@dataclass(frozen=True)
class Head:
    """What follows the head: logits * scale, then cap * tanh(logits / cap) where cap is not 0."""

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits * self.scale
        return torch.tanh(scaled / self.cap) * self.cap if self.cap else scaled


# --- what follows the head


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """How the bare `model` makes its logits; None where it is not as `use_chunked_head` needs it.

    In a forward pass the head is replaced by given logits, small and large: what comes out shows what is done
    with them, which at the first weights' small logits could not be seen.
    """
    head, body = model.get_output_embeddings(), model.base_model  # type: ignore[operator]
    if type(head) is not nn.Linear or body is model:
        return None
    went_in: list[Tensor] = []
    came_out: list[Any] = []
    given: list[Tensor] = []

    def stand_in(hidden: Tensor) -> Tensor:
        went_in.append(hidden)
        generator = torch.Generator().manual_seed(0)
        logits = 20 * torch.randn(*hidden.shape[:-1], head.out_features, generator=generator)
        given.append(logits.to(hidden))
        return given[-1]

    hook = body.register_forward_hook(lambda module, args, output: came_out.append(output))  # type: ignore[union-attr]
    was_training = model.training
    ids = torch.arange(8, device=head.weight.device).unsqueeze(0) % head.out_features
    try:
        with _forward_of(head, stand_in):
            found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    finally:
        hook.remove()
        model.train(was_training)
    if len(went_in) != 1 or not torch.equal(went_in[0], came_out[-1].last_hidden_state):
        return None
    limit = (1e-6 if given[0].dtype == torch.float32 else 1e-2) * found.abs().max()
    for candidate in _candidates(model.config):
        if (candidate(given[0].float()) - found.float()).abs().max() <= limit:
            return candidate
    return None


def _candidates(config: Any) -> Iterator[Head]:
    """The factors and the cap have these names in transformers' configurations."""
    text = text_config(config)
    yield Head()
    if cap := getattr(text, "final_logit_softcapping", None):
        yield Head(cap=float(cap))
    if scale := getattr(text, "logit_scale", None):
        yield Head(scale=float(scale))
    if divisor := getattr(text, "logits_scaling", None):
        yield Head(scale=1 / float(divisor))


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


# --- the chunked loss


def use_chunked_head(model: nn.Module, head: Head) -> None:
    """From now on the bare `model` gives the summed loss, scalar fp32, where a forward pass gets LABELS.

    Only methods of this model are replaced, so names of weights stay, and whatever wraps it (DDP, FSDP2,
    DeepSpeed, peft) sees a forward pass as before.
    """
    own, linear = model.forward, model.get_output_embeddings()  # type: ignore[operator]
    make_logits = linear.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        labels, by_token = kwargs.pop(LABELS, None), kwargs.pop(BY_TOKEN, False)
        if labels is None:
            return own(*args, **kwargs)
        output = model.base_model(*args, **kwargs)  # type: ignore[operator]
        if by_token:
            return losses_of_hidden(output.last_hidden_state, labels)
        loss = loss_of_hidden(output.last_hidden_state, labels)
        router = router_of(model) if model.training else None
        return loss if router is None else loss + router.term(router.balance(output.router_logits), labels)

    def losses_of_hidden(hidden: Tensor, labels: Tensor) -> Tensor:
        last = model.get_output_embeddings()  # type: ignore[operator]
        parts, flat = hidden.flatten(0, 1), labels.flatten()
        losses = [
            losses_by_token(head(last(parts[rows])), flat[rows])
            for rows in _chunks(len(parts), last.out_features)
        ]
        return torch.cat(losses).view_as(labels)

    def loss_of_hidden(hidden: Tensor, labels: Tensor) -> Any:
        last = model.get_output_embeddings()  # type: ignore[operator]
        if _compute_dtype(hidden) == torch.float16:  # too small for a gradient that is not scaled yet
            return summed_cross_entropy(head(last(hidden)), labels)
        if last is linear:  # called as a module: ZeRO 3 gathers its weight then
            return last(hidden, labels)
        return _AdaptedHeadLoss.apply(hidden.flatten(0, 1), labels.flatten(), last, head, *_trainable(last))  # type: ignore[no-untyped-call]

    def loss_or_logits(hidden: Tensor, labels: Tensor | None = None) -> Any:
        if labels is None:
            return make_logits(hidden)
        return _HeadLoss.apply(hidden.flatten(0, 1), linear.weight, linear.bias, labels.flatten(), head)  # type: ignore[no-untyped-call]

    model.forward, linear.forward = forward, loss_or_logits
    model.__dict__[_HEAD] = linear


def losses_by_token(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., V), (...) -> (...) fp32, 0 where labels are -100. A row of a batch at a time."""
    with torch.autocast(labels.device.type, enabled=False):
        rows = zip(logits.unbind(), labels.unbind(), strict=True) if labels.ndim > 1 else [(logits, labels)]
        losses = [
            F.cross_entropy(each.float(), of, ignore_index=IGNORED, reduction="none") for each, of in rows
        ]
    return torch.stack(losses) if labels.ndim > 1 else losses[0]


def has_chunked_head(model: nn.Module, n_rows: int) -> bool:
    """Whether `model`, bare or wrapped, is to make the loss of so many rows a chunk at a time."""
    bare: Any = bare_of(model)
    linear: nn.Linear | None = bare.__dict__.get(_HEAD)
    if linear is None or n_rows * linear.out_features <= WORTH_ELEMENTS:
        return False
    last = bare.get_output_embeddings()
    return last is linear or not any(hasattr(p, "ds_id") for p in last.parameters())


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def rows_at_once(n_rows: int, vocabulary: int) -> int:
    """Rows of logits that are in memory together, for a batch of `n_rows` tokens."""
    return n_rows if n_rows * vocabulary <= WORTH_ELEMENTS else _chunk_rows(n_rows, vocabulary)


def _chunk_rows(n_rows: int, vocabulary: int) -> int:
    return max(1, min(-(-n_rows // CHUNKS), CHUNK_ELEMENTS // vocabulary))


def _chunks(n_rows: int, vocabulary: int) -> Iterator[slice]:
    rows = _chunk_rows(n_rows, vocabulary)
    return (slice(start, start + rows) for start in range(0, n_rows, rows))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast would compute a product of `tensor` in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _HeadLoss(torch.autograd.Function):
    """(N, H), (V, H), (V) or None, (N) -> scalar fp32. The gradient of the weight is added up in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
    ) -> Tensor:
        dtype = _compute_dtype(hidden)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            d_hidden = torch.empty_like(hidden) if of_hidden else None
            d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None  # type: ignore[arg-type]
            for rows in _chunks(len(hidden), len(weight)):
                part = hidden[rows].to(dtype)
                loss, gradient = loss_and_gradient(
                    F.linear(part, matrix, offset),
                    labels[rows],
                    scale=head.scale,
                    cap=head.cap,
                    gradient=any((of_hidden, of_weight, of_bias)),
                )
                total += loss
                if gradient is None:
                    continue
                if d_bias is not None:
                    d_bias += gradient.sum(0, dtype=torch.float32)
                gradient = gradient.to(dtype)
                if d_hidden is not None:
                    d_hidden[rows] = gradient @ matrix
                if d_weight is not None:
                    _add_product_(d_weight, gradient.T, part)
                del gradient  # before the next one is made
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[0]
        d_hidden, d_weight, d_bias = (
            None if each is None else each.mul_(factor) for each in ctx.saved_tensors
        )
        of_weight, of_bias = ctx.dtypes
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(of_weight),
            None if d_bias is None else d_bias.to(of_bias),
            None,
            None,
        )


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. total is fp32, also where the factors are not."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _AdaptedHeadLoss(torch.autograd.Function):
    """The same through a head that is a module of its own kind, such as one with LoRA."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, module: nn.Module, head: Head, *weights: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        of_hidden, needed = ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weights = [torch.zeros_like(w, dtype=torch.float32) for w in weights] if needed else []
        vocabulary: int = module.out_features  # type: ignore[assignment]
        for rows in _chunks(len(hidden), vocabulary):
            part = hidden[rows].detach().requires_grad_(of_hidden)
            with torch.set_grad_enabled(needed):
                logits = module(part)
            loss, gradient = loss_and_gradient(
                logits.detach(), labels[rows], scale=head.scale, cap=head.cap, gradient=needed
            )
            total += loss
            if gradient is None:
                continue
            asked = [*([part] if of_hidden else []), *weights]
            found = list(torch.autograd.grad(logits, asked, gradient.to(logits.dtype)))
            if d_hidden is not None:
                d_hidden[rows] = found.pop(0)
            for into, each in zip(d_weights, found, strict=True):
                into += each
        ctx.save_for_backward(d_hidden, *d_weights)
        ctx.dtypes = [w.dtype for w in weights]
        return total.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_weights = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden.mul_(upstream[0])
        weights = [d.mul_(upstream[0]).to(dtype) for d, dtype in zip(d_weights, ctx.dtypes, strict=True)]
        return (d_hidden, None, None, None, *weights)
