"""Tiny random models of the families that people train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.train_parts import VOCABULARY

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {**SIZES, **WINDOW, "head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        **{f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")},
    },
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GEMMA, "final_logit_softcapping": 30.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA},
    "gemma3-multimodal": {
        "model_type": "gemma3",
        "text_config": {**GEMMA, "vocab_size": VOCABULARY},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 8},
    "phi3": {"model_type": "phi3", **SIZES, "sliding_window": None, "pad_token_id": 0},
    "mixtral": {"model_type": "mixtral", **SIZES, **EXPERTS},
    "olmoe": {"model_type": "olmoe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt-oss": {"model_type": "gpt_oss", **SIZES, **WINDOW, **EXPERTS, "head_dim": 8},
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **SIZES,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}

MIXTURES = ("mixtral", "olmoe", "gpt-oss")
"""Whose routers have a loss in transformers."""
NO_INT4 = {"falcon": "its linear layers are of a class of their own"}
"""And why bitsandbytes leaves most of them as they are."""
MASKED = ("gpt-oss", "falcon")
"""Which do not find documents in position_ids: they are put into their masks."""

HYBRID = {**SIZES, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "BERT and other encoders": (
        {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        | {"num_attention_heads": 4},
        "a token sees the tokens after it",
        "they are not causal",
    ),
    "Qwen3-Next, Qwen3.5 and other hybrids with linear attention": (
        {"model_type": "qwen3_5_text", **HYBRID, **DELTA},
        "a document sees the one before it",
        "the state of their linear or recurrent layers goes on into the next document",
    ),
    "RWKV, xLSTM": (
        {"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        "a document sees the one before it",
        "the state goes on into the next document",
    ),
    "OpenAI GPT (the first)": (
        {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "a document sees the one before it",
        "it has a causal mask of its own, which knows no documents",
    ),
}
"""Families that take no packed documents: a configuration, what the probe says, and the reason."""


def write_base(name: str, folder: Path, **settings: Any) -> Path:
    """A base of this family with random weights, large enough that a wrong mask is seen in its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**FAMILIES[name], **settings}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    text = config.get_text_config()
    text.vocab_size = VOCABULARY
    if config is not text and hasattr(config, "vocab_size"):
        config.vocab_size = VOCABULARY
    for one in {id(c): c for c in (config, text)}.values():
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(one, token, 0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder)
    return folder
