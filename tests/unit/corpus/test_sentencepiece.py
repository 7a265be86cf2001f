"""Tokenizers that are a SentencePiece model alone: sentencepiece's own ids, in training and exported."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from raydist.corpus.sentencepiece import PROBES
from raydist.corpus.tokenizer import Reference, pretrained_tokenizer
from raydist.errors import ModelError
from raydist.model.build import load_tokenizer

SCRIPTS = "English, naïve café; русский текст ελληνικά עברית العربية 中文 日本語 한국어 ไทย हिन्दी 👍"
TEXTS = [
    *(SCRIPTS[i:] for i in range(len(SCRIPTS))),
    *(f"    def f{i}(self, x):\n        return  x + {i}  # of {i}\n\n" for i in range(60)),
    *("  two leading", "trailing  ", "\n\n\tthree   spaces\r\n", " ", "", "<s> is text </s>"),
]
LLAMA = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "character_coverage": 0.99}
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
GEMMA = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>"}
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llama 2": ("LlamaTokenizer", {**LLAMA, **PLAIN}),
    "open llama": ("LlamaTokenizer", LLAMA),  # its model removes spaces, as SentencePiece does by default
    "llama, of few spaces": ("LlamaTokenizer", {**LLAMA, "normalization_rule_name": "identity"}),
    "no config": (None, {**LLAMA, **PLAIN}),
    "gemma": ("GemmaTokenizer", {**LLAMA, **PLAIN, **GEMMA, "bos_piece": "<bos>", "add_dummy_prefix": False}),
    "t5": ("T5Tokenizer", {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
}


def write(folder: Path, kind: str) -> Path:
    name, options = KINDS[kind]
    folder.mkdir()
    stem = folder / ("spiece" if kind == "t5" else "tokenizer")
    sentences = [line for text in TEXTS for line in text.split("\n") if line.strip()]
    options = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_prefix=str(stem), **options)
    if name is not None:
        settings = {"tokenizer_class": name, "add_bos_token": "llama" in kind}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return stem.with_suffix(".model")


@pytest.mark.parametrize("kind", KINDS)
def test_its_ids_are_those_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    # transformers' T5 takes </s> within a text for the token
    texts = [text for text in (*TEXTS, *PROBES) if kind != "t5" or "</s>" not in text]
    stored = write(tmp_path / "base", kind)
    processor = SentencePieceProcessor(model_file=str(stored))
    expected = [processor.encode(text) for text in texts]
    spec = pretrained_tokenizer(str(tmp_path / "base"))
    flat, offsets = Reference(spec).encode_batch(texts)
    assert [flat[a:b].tolist() for a, b in pairwise(offsets)] == expected
    assert spec.eos_token_id == processor.eos_id()
    begins = (processor.bos_id(),) if "llama" in kind else ()
    assert spec.prefix == begins
    load_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "model")  # as export does
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text, ids in zip(texts, expected, strict=True):
        assert "<s>" in text or exported(text, add_special_tokens=False)["input_ids"] == ids
    assert exported.eos_token_id == spec.eos_token_id
    assert tuple(exported("a")["input_ids"][: len(begins)]) == begins


def test_a_damaged_model_is_refused_by_name(tmp_path: Path) -> None:
    stored = write(tmp_path / "base", "llama 2")
    stored.write_bytes(stored.read_bytes()[:-500] + b"\xff" * 400)
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be read") as refused:
        pretrained_tokenizer(str(tmp_path / "base"))
    assert refused.value.where == str(stored) and "copy it" in refused.value.fix
    stored.write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken stores its ranks
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be read"):
        pretrained_tokenizer(str(tmp_path / "base"))
