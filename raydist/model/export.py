"""The trained model: written as a Hugging Face folder, loaded again, sampled from, merged into its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raydist import files
from raydist.bucket import mirror
from raydist.errors import ModelError, first_line
from raydist.folder import RunFolder
from raydist.job.schema import Job
from raydist.model import quantization
from raydist.model.adapter import whole
from raydist.model.base import load_adapter, load_base, stored_dtype
from raydist.model.build import base_path, load_config, load_tokenizer, quietly
from raydist.model.layers import text_config
from raydist.model.quantization import load_dequantized, load_quantized, read_config
from raydist.model.trust import ADAPTER_WEIGHTS, read_adapter_config
from raydist.model.vocabulary import grow_vocabulary, n_tokens_of

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM

    from raydist.model.base import CausalModel

MODEL_FILES = (
    "*.safetensors", "*config.json", "*.index.json", "tokenizer*", "special_tokens_map.json", "vocab.*",
    "merges.txt", "added_tokens.json", "chat_template*", "README.md",
)  # fmt: skip

MERGE_TOLERANCE = 1e-3
"""Of the largest logit, in fp32: how much a merge may move one. Rounding moves them by 1e-6."""


@quietly()
def save_model(
    model: nn.Module,
    state: dict[str, Tensor],
    job: Job,
    tokenizer_folder: Path,
    folder: Path,
    card: str,
    *,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write a Hugging Face folder with the tokenizer and `card` as README.md.

    model: for its configuration and the names in it.  state: what is written, on the CPU.
    It is made next to `folder` and renamed, so `folder` is whole or missing.  before: called once it is
    made; `folder` is put in its place when that returns.
    """
    with replacing(folder) as temporary:
        if job.adapter is None:
            save_full(model, state, saved_dtype(job), temporary)
        else:
            save_adapter(model, state, temporary)
            quantization.write_config(job, temporary)
        load_tokenizer(tokenizer_folder).save_pretrained(temporary)
        (temporary / "README.md").write_text(card)
        before()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder next to `folder`; on success flush it to disk and put it in its place.

    What a user put into the old folder, by names that no model's file has, is in the new one too.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in folder.iterdir() if folder.is_dir() else ():
        target = temporary / path.name
        if is_model_file(path.name) or target.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)
    for path in [*temporary.rglob("*"), temporary]:
        if not path.is_symlink():
            if path.is_file():
                files.like_its_folder(path)
            files.flush_to_disk(path)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    files.flush_to_disk(folder.parent)


def is_model_file(name: str) -> bool:
    """Whether transformers, peft or raydist write files of this name into a model's folder."""
    return any(fnmatch(name, known) for known in MODEL_FILES)


def model_files(folder: Path) -> list[Path]:
    """The files that decide what the model in `folder` computes: weights, configuration and tokenizer."""
    names = (path for path in folder.iterdir() if path.is_file() and is_model_file(path.name))
    return sorted(path for path in names if path.name != "README.md")


def save_full(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})


def save_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """As peft writes it; modules that were trained whole under each name that they have in the model."""
    from safetensors.torch import load_file, save_file

    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    saved = {name: state[first[parameter]].clone() for name, parameter in every if whole(name, parameter)}
    if not saved:
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        return
    lora = {name: tensor for name, tensor in state.items() if name not in saved}
    model.save_pretrained(folder, state_dict=lora, save_embedding_layers=False)  # type: ignore[operator]
    path = folder / ADAPTER_WEIGHTS
    save_file({**load_file(path), **saved}, path, metadata={"format": "pt"})


def saved_dtype(job: Job) -> torch.dtype:
    """The dtype of model/: the base's, by its weights if its config.json is silent; of a new model fp32."""
    if job.model.base is None:
        return torch.float32
    dtype = load_config(job).dtype
    return dtype if isinstance(dtype, torch.dtype) else stored_dtype(base_path(job)) or torch.float32


def full_state(
    module: nn.Module,
    dtype: torch.dtype | None,
    *,
    gather_full: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
    keep: bool = True,
) -> dict[str, Tensor]:
    """The state to save, on the CPU, a tensor at a time. Tied tensors appear once.

    dtype: of floating tensors; None keeps each in its own and leaves out what was not trained.
    gather_full: gives one whole parameter, called for all of them, in order, also by a rank that keeps none.
    """
    state = {}
    for name, parameter in module.named_parameters():
        if dtype is not None or parameter.requires_grad:
            tensor = gather_full(parameter)
            if keep:
                state[name] = _on_cpu(tensor, dtype)
    if keep and dtype is not None:
        state.update({name: _on_cpu(buffer, dtype) for name, buffer in _saved_buffers(module)})
    return state


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


@quietly()
def load_trained(folder: Path) -> CausalModel | PeftModelForCausalLM:
    """The model in a run's model/, for inference. An adapter is put on its base, quantized as in training."""
    if not (folder / "adapter_config.json").exists():
        return load_base(str(folder), where=str(folder)).eval()
    base = str(read_adapter_config(folder).base_model_name_or_path)
    if (quantized := read_config(folder)) is not None:
        model = load_quantized(base, quantized, torch.device("cpu"), where=base)
    else:
        model = load_base(base, where=base)
    _grow(model, folder)
    adapted = load_adapter(model, folder)
    adapted.eval()
    return adapted


def continue_text(
    folder: Path, prompt: Sequence[int], n_tokens: int, seed: int = 0, *, bos: int | None = None
) -> tuple[str, str]:
    """The prompt and a continuation of at most `n_tokens`, sampled from the model in `folder`.

    bos: the id that the model reads in front of the prompt; None for none. The temperature is 0.8, because
    the likeliest continuation of a small model only repeats itself.
    """
    model, tokenizer = load_trained(folder), load_tokenizer(folder)
    begin = [] if bos is None else [bos]
    ids = torch.tensor([[*begin, *prompt]])
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        )
    before, after = out[0, len(begin) : ids.shape[1]], out[0, ids.shape[1] :]
    return str(tokenizer.decode(before)), str(tokenizer.decode(after, skip_special_tokens=True))


@quietly()
def merge_adapter(run: RunFolder, base: Path | None = None) -> Path:
    """Add the run's adapter to its base, in fp32, and write <run>/export/merged in the base's dtype.

    A quantized base is dequantized first, and its merged model is fp32. base: a folder with a copy of an
    unquantized base. Raises ModelError when there is no adapter, or no base that it fits.
    """
    run.fetch_model()
    source, target = run.model, run.merged
    quantized = _check(source, base)
    name = str(base or read_adapter_config(source).base_model_name_or_path)
    try:
        model, dtype = _merged(name, source, quantized)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter cannot be merged into {name}",
            where=str(source),
            why=first_line(error),
            fix="put the base back there" + ("" if quantized else ", or give a copy of it: --base FOLDER"),
        ) from error
    with replacing(target) as temporary:
        save_full(model, full_state(model, dtype), dtype, temporary)
        load_tokenizer(source).save_pretrained(temporary)
    mirror.publish_folder(target)
    return target


def _check(source: Path, base: Path | None) -> dict[str, Any] | None:
    """How the adapter's base was quantized; None if it was not. Raises ModelError if it cannot be merged."""
    if not (source / "adapter_config.json").exists():
        raise ModelError(
            f"{source} is not an adapter",
            why="there is nothing to merge",
            fix="use model/ as it is" if source.exists() else "let the run finish first",
        )
    quantized = read_config(source)
    if quantized is not None and base is not None:
        raise ModelError(
            "the adapter of a quantized run is not merged into another base",
            where=f"--base {base}",
            why="it was trained on the quantized weights; those of int4 move a layer's output by about 9%",
            fix="leave --base out: the weights that it was trained on are dequantized and merged with it",
        )
    return quantized


def _merged(base: str, adapter: Path, quantized: dict[str, Any] | None) -> tuple[nn.Module, torch.dtype]:
    """The merged model in fp32, and the dtype of the base."""
    if quantized is not None:
        model: Any = load_dequantized(base, quantized, where=base)
    else:
        model = load_base(base, where=base, dtype="auto")
    dtype = model.dtype
    _grow(model, adapter)
    adapted = load_adapter(model.float(), adapter).eval()
    _untie(adapted)
    ids = torch.randperm(adapted.get_input_embeddings().weight.shape[0])[None, :32]
    with torch.inference_mode():
        trained = adapted(input_ids=ids).logits
        tied = [config for config in _configs(adapted) if config.tie_word_embeddings]
        merged: Any = adapted.merge_and_unload()
        _tie_again(merged, tied)
        moved = (merged(input_ids=ids).logits - trained).abs().max().item()
    if not moved <= MERGE_TOLERANCE * trained.abs().max().item():
        raise ModelError(
            "the merged model is not the trained one",
            where=str(adapter),
            why=f"logits moved by {moved:.1e}, of at most {trained.abs().max().item():.1e}",
            fix="use the adapter on its base, by peft",
        )
    return merged, dtype


def _grow(model: nn.Module, adapter: Path) -> None:
    """Rows for the tokens of the adapter's tokenizer, if it was trained with whole modules."""
    if read_adapter_config(adapter).modules_to_save:  # type: ignore[attr-defined]
        grow_vocabulary(model, n_tokens_of(adapter))


def _untie(adapted: Any) -> None:
    """Give an adapted output head a weight of its own, where it shares that of the embedding.

    The adapter is the head's alone: merged into a shared weight it would change the embedding as well.
    """
    head, embedding = adapted.get_output_embeddings(), adapted.get_input_embeddings()
    layers = [getattr(each, "base_layer", each) for each in (head, embedding)]
    if layers == [head, embedding] or layers[0].weight is not layers[1].weight:
        return
    layers[0].weight = nn.Parameter(layers[0].weight.detach().clone(), requires_grad=False)
    for config in _configs(adapted):
        config.tie_word_embeddings = False


def _tie_again(merged: Any, configs: list[Any]) -> None:
    """An embedding that was trained whole has left a head with equal weights: they are one again.

    configs: those that said so before the merge.
    """
    for config in configs:
        config.tie_word_embeddings = True
    merged.tie_weights()


def _configs(adapted: Any) -> list[Any]:
    """The model's configuration, and that of its text where it has one of its own."""
    config = adapted.get_base_model().config
    return list({id(each): each for each in (config, text_config(config))}.values())
