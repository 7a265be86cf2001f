"""Small pretrained models, random as they are, that stand where the hub's would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def write_base(folder: Path, config: dict[str, Any]) -> Path:
    """With a byte-level tokenizer, so that any text can be read."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the patient presented with acute symptoms of the heart"] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(core.get_vocab()), "bos_token_id": 0, "eos_token_id": 0}
    made = AutoConfig.for_model(**config, **sizes)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder
