"""Tokenizers that are stored as a SentencePiece model alone, such as Llama 2's: no tokenizer.json.

    tokenizer.model ─▶ transformers' conversion ─▶ compared with sentencepiece ─▶ as it is, or with the
                                                                                  model's own normalization

transformers knows how the pieces become tokens; the spaces it treats by the tokenizer's class, not by the
model: it drops the prefix of a text that begins with a space, and keeps spaces that the model removes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from raydist.errors import ModelError, first_line

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PROBES = (
    *(" " * n + word for n in (1, 2, 3, 7) for word in ("", "two words", "x = 1")),
    *("trailing " * 2, "in  the   middle", "tab\tand\nline\n\n  end\n", "\r\n", "\n", "\t"),
    "def f(x):\n        return x  # 12345.678\n",
    "English, naïve café; русский ελληνικά עברית العربية 中文 日本語 한국어 ไทย हिन्दी. 👍",
    "1234567890 ½ ① ﬁ \uff01 \u3000wide\u3000 \xa0nbsp",
)
"""Texts as they occur: spaces in every place, lines, digits, scripts, characters that Unicode makes equal."""


def model_in(folder: Path) -> Path | None:
    """The SentencePiece model in a tokenizer's folder; None for none, and where there is a tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        return None
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def open_model(path: Path) -> Any:
    """sentencepiece's own processor. Raises ModelError for a file that is no such model."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer's {path.name} cannot be read",
            where=str(path),
            why=f"it is damaged, or not a SentencePiece model: {first_line(error)}",
            fix="copy it from its source again, or add the tokenizer.json",
        ) from error


def faithful(loaded: Any, path: Path) -> Any:
    """The tokenizer that transformers made of the model in `path`, or one that gives the model's own ids.

    Raises ModelError where neither does, with the first text that has other ids.
    """
    processor = open_model(path)
    if _difference(loaded.backend_tokenizer, processor) is None:
        return loaded
    made = _with_normalization(loaded, processor)
    if (text := _difference(made.backend_tokenizer, processor)) is not None:
        raise ModelError(
            f"the tokenizer's {path.name} cannot be converted",
            where=str(path),
            why=f"{text!r} would become other tokens than in sentencepiece itself",
            fix="add a tokenizer.json to the folder, such as the one that its authors publish",
        )
    return made


def _difference(tokenizer: Tokenizer, processor: Any) -> str | None:
    """The first of PROBES that the two encode differently. Special tokens in a text are text to both."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        for text in PROBES:
            if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
                return text
        return None
    finally:
        tokenizer.encode_special_tokens = before


def _with_normalization(loaded: Any, processor: Any) -> Any:
    """The same tokens and special tokens, with the spaces and characters as the model's own settings say.

    In a class of transformers that leaves them so when it is saved and loaded.
    """
    from transformers import PreTrainedTokenizerFast

    core = loaded.backend_tokenizer
    core.normalizer, core.pre_tokenizer = _normalizer(processor), None
    named = {
        name: getattr(loaded, name) for name in loaded.SPECIAL_TOKENS_ATTRIBUTES if name.endswith("_token")
    }
    options = {"model_max_length": loaded.model_max_length, "clean_up_tokenization_spaces": False}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **named, **options)
    made.chat_template = loaded.chat_template
    return made


def _normalizer(processor: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = generated.ModelProto.FromString(processor.serialized_model_proto())
    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)
