"""From a job to a model in memory.

Heavy imports are inside the functions: the driver validates jobs with `load_config` and `check_fits`
alone.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydist.corpus.tokenizer import open_pretrained
from raydist.errors import JobError, ModelError, first_line
from raydist.job.schema import Job
from raydist.model import quantization
from raydist.model.base import check_finite, check_stored, load_base
from raydist.model.compiled import compile_layers, why_not_compiled
from raydist.model.experts import quantize_experts, quantized_experts
from raydist.model.head import Head, find_head, use_chunked_head
from raydist.model.layers import bare_of, not_of_text, text_config
from raydist.model.precision import DTYPES, check_precision, exact_fp32
from raydist.model.quantized import Quantized
from raydist.model.router import use_router_loss
from raydist.model.trust import NO_CODE, check_sizes, read_config
from raydist.model.vocabulary import check_new_rows_are_trained, grow_vocabulary, n_tokens_of, rows_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from raydist.model.attention.choose import Chosen


@contextmanager
def quietly() -> Iterator[None]:
    """Silences progress bars and the warnings of peft and DeepSpeed (saving a model imports DeepSpeed)."""
    from transformers.utils import logging as hub

    bars, level = hub.is_progress_bar_enabled(), logging.root.manager.disable
    hub.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft finds out by itself
            # patterns of peft's own making, for the experts of mixtures, which do get this rank
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
            for text in ("Model has `tie_word_embeddings=True`", "Input and output embeddings are no longer"):
                warnings.filterwarnings("ignore", text)  # peft; a merged model has them tied again
            yield
    finally:
        logging.disable(level)
        if bars:
            hub.enable_progress_bar()


@dataclass(frozen=True)
class Sizes:
    """total, trainable: numbers of parameters.  weight_bytes: of all weights while training.

    vocabulary: rows of the embedding.  layers, hidden: number of layers, width.  frozen: paths of what text
    does not pass through.  without_adapter: paths of quantized experts.  model: the one that was counted, on
    meta, with its adapter.
    """

    total: int
    trainable: int
    weight_bytes: int
    vocabulary: int
    layers: int
    hidden: int
    frozen: tuple[str, ...]
    without_adapter: tuple[str, ...]
    model: nn.Module


def load_config(job: Job, vocab_size: int | None = None) -> PretrainedConfig:
    """The model's transformers configuration. vocab_size: of a new model, which has its tokenizer's.

    Raises ModelError for a base that cannot be used, JobError for a configuration with unknown
    names. Code that comes with a model is never run.
    """
    if job.model.config is not None:
        return _config_from(job.model.config, vocab_size)
    with _usable(job):
        return read_config(base_path(job))


def base_path(job: Job) -> str:
    """The hub id, or the folder as an absolute path: a trained adapter names it, wherever it is loaded."""
    assert job.model.base is not None
    folder = Path(job.model.base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else job.model.base


def _config_from(given: dict[str, Any], vocab_size: int | None) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind, options = given["model_type"], {k: v for k, v in given.items() if k != "model_type"}
    check_sizes(options, JobError, "model.config")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError as error:
        raise JobError(
            f"no model type {kind!r}", where="model.config.model_type", fix=_closest(kind, _model_types())
        ) from error
    known = {*default.to_dict(), *default.attribute_map}
    for name in options.keys() - known:
        raise JobError(
            f"{kind} has no setting {name!r}", where=f"model.config.{name}", fix=_closest(name, sorted(known))
        )
    if vocab_size is not None:
        options["vocab_size"] = vocab_size
    try:
        return AutoConfig.for_model(kind, **options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise _no_such_model(kind, error) from error


def _model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


@contextmanager
def _usable(job: Job) -> Iterator[None]:
    """Turns what reading the base raises into a ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (
        *(OSError, StrictDataclassError, SafetensorError),
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise ModelError(
            f"the base model {job.model.base} cannot be used",
            where="model.base",
            why=first_line(error),
            fix="give a hub id that this machine can reach, or a folder with config.json and *.safetensors",
        ) from error


@quietly()
def check_base(job: Job) -> None:
    """Raises ModelError where the stored tensors are not those of the base's configuration, or no numbers."""
    with _usable(job):
        check_stored(base_path(job))


def check_fits(config: PretrainedConfig, job: Job) -> None:
    """Raises JobError or ModelError for what the model cannot do."""
    from raydist.model.attention.choose import check_model_attention

    check_model_attention(config, job.model.attn_implementation)
    positions = getattr(text_config(config), "max_position_embeddings", None)
    sections = [*(["stages"] * len(job.stages) or ["packing"]), "eval"]
    for section, block_size in zip(sections, [*job.block_sizes, job.eval_block_size], strict=True):
        if positions is not None and block_size > positions:
            raise JobError(
                f"block_size {block_size} is above the model's {positions} positions",
                where=f"{section}.block_size",
                why="the model has never seen, or cannot address, positions beyond that",
                fix=f"{positions} or less; or, for a new model, more max_position_embeddings",
            )
    if job.adapter is not None and job.model.base is None:
        raise JobError(
            "an adapter on random weights",
            where="adapter",
            why="the frozen random base is not stored anywhere, so the adapter could never be used",
            fix="give model.base, or remove adapter",
        )
    quantization.check_quantization(config, job)


def check_tokenizer(job: Job) -> None:
    """Raises JobError where the job names a tokenizer whose ids mean other tokens than the base's own do.

    A base without a tokenizer takes any; tokens that the base's does not have may be named.
    """
    added, where = job.model.add_tokens, "model.tokenizer"
    named = added if isinstance(added, str) else job.model.tokenizer
    if job.model.base is None or not isinstance(named, str):
        return
    if named is added:
        where = "model.add_tokens"
    try:
        own = load_tokenizer(base_path(job)).get_vocab()
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):
        return
    given = {number: token for token, number in load_tokenizer(named).get_vocab().items()}
    others = sorted((number, token) for token, number in own.items() if given.get(number, token) != token)
    if others:
        number, token = others[0]
        raise JobError(
            f"{len(others):,} of the base's {len(own):,} tokens are others in {named}",
            where=where,
            why=f"the model knows {number} as {token!r}, and this tokenizer means {given[number]!r} by it",
            fix=f"leave {where} out: the base's own is used then",
        )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = open_pretrained(folder)
    return tokenizer


Fit = Callable[[nn.Module], object]


@quietly()
def build_model(
    job: Job,
    tokenizer_folder: Path,
    device: torch.device,
    *,
    place: torch.device | None = None,
    fit: Fit | None = None,
) -> nn.Module:
    """The model to train on `device`, probed, in training mode.

    Trainable weights are fp32. With an adapter the base is frozen and keeps its dtype, but its linear layers
    have the dtype that they compute in, if that is of 16 bits. place: where the weights are put, `device` by
    default; on meta there are none. fit: gives the bare model its attention and its way to the loss, by
    default `fit_model`.
    """
    from raydist.model.adapter import add_lora, narrow_frozen
    from raydist.model.attention.choose import check_attention
    from raydist.model.recompute import checkpoint_layers

    exact_fp32()
    check_precision(job.train.mixed_precision, device.type, on_worker=True)
    check_attention(job.model.attn_implementation, device.type, on_worker=True)
    config = load_config(job, len(load_tokenizer(tokenizer_folder)))
    check_fits(config, job)
    place = place or device
    with torch.random.fork_rng(devices=[]), torch.device(place if place.type == "meta" else "cpu"):
        torch.manual_seed(job.seed)
        model = _bare(config, job, tokenizer_folder, place)
        if job.model.add_tokens:
            grow_vocabulary(model, n_tokens_of(tokenizer_folder))
        check_vocabulary(rows_of(model), len(load_tokenizer(tokenizer_folder)))
        freeze_others(model)
        # the bare model, which knows how attention is chosen
        fit(model) if fit else fit_model(model, job, device)
        use_router_loss(model, job.train.router_aux_loss_coef)
        model = model if job.adapter is None else add_lora(model, job.adapter)
        check_new_rows_are_trained(model, job)
    if whole_in_fp32(job):
        model = model.float()
    if (compute := DTYPES[job.train.mixed_precision]) != torch.float32:
        narrow_frozen(model, compute)  # not before, or the adapter's first weights would be rounded
    model = model.to(place)
    checkpoint_layers(model, job.train.gradient_checkpointing)
    if not fitted_of(model).uncompiled:
        compile_layers(model, must=job.train.compile is True)
    return model.train()


def freeze_others(model: nn.Module) -> list[str]:
    """Freeze the modules of the bare multimodal model that text does not pass through; their paths.

    They have no gradient: they would be stepped by weight decay alone, and kept twice in each checkpoint.
    """
    others = not_of_text(model)
    for path in others:
        model.get_submodule(path).requires_grad_(False)
    return others


def _bare(config: PretrainedConfig, job: Job, tokenizer_folder: Path, place: torch.device) -> nn.Module:
    if job.model.base is None:
        return _random(config, tokenizer_folder).to(place)
    if place.type == "meta":
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **NO_CODE)
        return model
    return _base(job, place).to(place)


@dataclass(frozen=True)
class Fitted:
    """What was found by trying the bare model. head: None where its logits are made whole.

    uncompiled: why its layers are not compiled; empty where they are.  frozen: paths of what text does not
    pass through.
    """

    attention: Chosen
    head: Head | None
    uncompiled: str
    frozen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the record of an attempt's start."""
        return {
            "attention": self.attention.name,
            "documents_in_mask": self.attention.masked,
            "attention_passed_over": self.attention.passed_over,
            "compiled": not self.uncompiled,
            "uncompiled": self.uncompiled,
            **({"frozen": self.frozen} if self.frozen else {}),
            "logits": "whole" if self.head is None else "in parts if they are many",
        }


def fit_model(model: nn.Module, job: Job, device: torch.device) -> Fitted:
    """Give the bare model the attention for `device` that passes the probe, and the chunked head."""
    from raydist.model.attention.choose import set_attention

    head = find_head(model)  # while attention is eager, which runs on every device
    uncompiled = why_not_compiled(job.train.compile, device, job.strategy.name)
    attention = set_attention(
        model,
        device,
        document_mask=job.packing.document_mask,
        asked=job.model.attn_implementation,
        compiled=not uncompiled,
    )
    fitted = Fitted(attention, head, uncompiled, tuple(not_of_text(model)))
    take_fitted(model, fitted)
    return fitted


def take_fitted(model: nn.Module, fitted: Fitted) -> None:
    """Give the bare model, whose attention is set already, what was found by trying it."""
    if fitted.head is not None:
        use_chunked_head(model, fitted.head)
    model.__dict__[_FITTED] = fitted


def fitted_of(model: nn.Module) -> Fitted:
    """What the model, bare or with an adapter, was given when it was built."""
    fitted: Fitted = bare_of(model).__dict__[_FITTED]
    return fitted


_FITTED = "_raydist_fitted"


def _no_such_model(kind: str, error: Exception) -> JobError:
    return JobError(
        f"no {kind} model can be made from this configuration",
        where="model.config",
        why=" ".join(str(error).split()),
        fix="check the types and sizes: heads divide hidden_size, key-value heads divide heads",
    )


def _random(config: PretrainedConfig, tokenizer_folder: Path) -> nn.Module:
    """The special tokens are the tokenizer's, also where the configuration names others."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(tokenizer_folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32, **NO_CODE
        )
        return model
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise _no_such_model(config.model_type, error) from error


def _base(job: Job, device: torch.device) -> nn.Module:
    """The base model: a quantized one is on `device`, another on the CPU.

    fp32 is exact for a quantized base: what is not quantized is fp32 then, whatever it is stored in.
    """
    dtype = torch.float32 if job.adapter is None else "auto"
    options: dict[str, Any] = {"attn_implementation": "eager"}
    with _usable(job):
        if job.quantization is not None:
            config = quantization.quantization_config(job)
            options["dtype"] = torch.float32 if job.train.mixed_precision == "fp32" else "auto"
            return quantization.load_quantized(base_path(job), config, device, **options)
        model: nn.Module = load_base(base_path(job), dtype=dtype, **options)
        check_finite(model, base_path(job))
        return model


def check_vocabulary(rows: int, tokens: int) -> None:
    """Raises ModelError where the tokenizer has more tokens than the model's embedding has rows."""
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens and the model embeds {rows}",
            where="model.tokenizer",
            why="the tokens beyond have no embedding",
            fix="use the base model's own tokenizer; or name this one in model.add_tokens, and the model gets"
            " rows for them",
        )


def whole_in_fp32(job: Job) -> bool:
    """Whether a base in 16 bits computes in fp32: nothing casts what whole modules in fp32 give it."""
    whole = job.adapter is not None and job.adapter.modules_to_save
    return bool(whole) and job.quantization is None and job.train.mixed_precision == "fp32"


@quietly()
def model_sizes(config: PretrainedConfig, job: Job, n_tokens: int = 0) -> Sizes:
    """Counted on a model on the meta device. n_tokens: of the tokenizer, for a base that gets new ones."""
    from transformers import AutoModelForCausalLM

    from raydist.model.adapter import add_lora, whole

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **NO_CODE)
        if job.model.add_tokens:
            grow_vocabulary(model, n_tokens)
        rows = rows_of(model)
        frozen = tuple(freeze_others(model))
        quantization.check_share(model, job)
        use_router_loss(model, job.train.router_aux_loss_coef)
        held_as = quantization.bytes_of_each(model, job)
        if job.quantization is not None:
            quantize_experts(model, job.quantization, torch.device("meta"))
        model = model if job.adapter is None else add_lora(model, job.adapter)
        check_new_rows_are_trained(model, job)
        trained = {parameter for name, parameter in model.named_parameters() if whole(name, parameter)}
    total, trainable = n_parameters(model), n_parameters(model, trainable=True)
    held = sum(n for weight, n in held_as.items() if weight not in trained) + 4 * trainable
    if job.adapter is None or whole_in_fp32(job):
        held = 4 * total
    text = text_config(config)
    return Sizes(
        total,
        trainable,
        held,
        rows,
        text.num_hidden_layers,
        text.hidden_size,
        frozen,
        without_adapter=tuple(quantized_experts(bare_of(model))),
        model=model,
    )


def n_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of all parameters, or of those that are trained. Quantized ones count one by one."""
    packed: dict[torch.Tensor, int] = {}
    for module in model.modules():
        if isinstance(module, Quantized):
            packed |= {module.weight: module.in_features * module.out_features, module.scales: 0}
    return sum(packed.get(p, p.numel()) for p in model.parameters() if p.requires_grad or not trainable)
