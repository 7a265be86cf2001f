"""The model that a run left behind: loaded, sampled from, or an adapter merged into its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydist.errors import ModelError
from raydist.folder import RunFolder
from raydist.training.model import SAFE, load_tokenizer, quietly, replacing, save_full
from raydist.training.quantization import load_dequantized, load_quantized, read_config
from raydist.training.weights import full_state
from raydist.training.world import World


@quietly()
def load_trained(folder: Path) -> Any:
    """The model in a run's model/, for inference; an adapter is on its base, quantized as in training."""
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if (quantized := read_config(folder)) is not None:
        model = load_quantized(base, quantized, torch.device("cpu"), **SAFE)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, **SAFE)
    return PeftModel.from_pretrained(model, folder).eval()


def continue_text(folder: Path, prompt: Sequence[int], n_tokens: int, seed: int = 0) -> tuple[str, str]:
    """The prompt and a sampled continuation, at most `n_tokens` long, by the model in `folder`.

    Sampled at temperature 0.8: the likeliest continuation of a small model only repeats itself.
    """
    model, tokenizer = load_trained(folder), load_tokenizer(folder)
    ids = torch.tensor([list(prompt)])
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
    before, after = out[0, : len(prompt)], out[0, len(prompt) :]
    return str(tokenizer.decode(before)), str(tokenizer.decode(after, skip_special_tokens=True))


@quietly()
def merge_adapter(run: Path, base: Path | None = None) -> Path:
    """Add the run's adapter to its base, in fp32, and write <run>/export/merged in the base's dtype.

    A quantized base is dequantized first, and the merged model is fp32. base: the folder of a copy of
    an unquantized base. Raises ModelError when there is no adapter, or no base that it fits.
    """
    source, target = RunFolder(run).model, RunFolder(run).merged
    quantized = _check(source, base)
    from peft import PeftConfig

    name = str(base or PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    try:
        model, dtype = _merged(name, source, quantized)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter cannot be merged into {name}",
            where=str(source),
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="put the base back there" + ("" if quantized else ", or give a copy of it: --base FOLDER"),
        ) from error
    with replacing(target) as temporary:
        save_full(model, full_state(model, lambda weight: weight, World(), dtype), dtype, temporary)
        load_tokenizer(source).save_pretrained(temporary)
    return target


def _check(source: Path, base: Path | None) -> dict[str, Any] | None:
    """How the adapter's base was quantized, None when it was not."""
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
    """In fp32; and the dtype that the base came in."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if quantized is not None:
        model: Any = load_dequantized(base, quantized, **SAFE)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **SAFE)
    dtype = model.dtype
    return PeftModel.from_pretrained(model.float(), adapter).merge_and_unload(), dtype
