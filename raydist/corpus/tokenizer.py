"""Text to token ids: those of the tokenizers library, computed by fastokens where it gives the same ones.

Special tokens inside a text are text, never control tokens. Nothing is added at its start or end.
"""

from __future__ import annotations

import functools
import json as jsonlib
import shutil
import unicodedata
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from raydist.bucket import mirror
from raydist.corpus import sentencepiece
from raydist.corpus.files import unchanged
from raydist.corpus.log import Ints, Tokens, held_out, token_dtype
from raydist.corpus.source import SourceFiles, open_source
from raydist.errors import EmptyCorpus, JobError, ModelError
from raydist.files import flush_to_disk, measure
from raydist.fingerprint import fingerprint
from raydist.job.schema import Job, NewTokenizer
from raydist.limits import oversized
from raydist.sealed import read_sealed, write_sealed
from raydist.storage import Storage

EOS = "<|endoftext|>"
CHECKSUMS = "checksums.json"
"""In the folder of a tokenizer that was trained or extended here: {file: {size, xxh3_128}}."""
SAMPLE_BYTES = 32 * 2**20
"""Text that a new tokenizer is trained on, divided evenly among the sources."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer by value.

    json: the content of its tokenizer.json, without truncation and padding; "" in a spec from `from_json`,
    which names a tokenizer but cannot encode.  folder: where transformers loads it from, a path or hub id.
    vocab_size: the highest id + 1, added tokens included.  bos_token_id: its BOS token, whether it uses it or
    not.  prefix: the ids that it puts in front of a text by itself.
    """

    json: str
    folder: Path | str
    eos_token_id: int | None
    vocab_size: int
    fingerprint: str
    bos_token_id: int | None = None
    prefix: tuple[int, ...] = ()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def from_content(
        cls,
        content: str,
        folder: Path | str,
        eos_token_id: int | None,
        bos_token_id: int | None = None,
        prefix: Sequence[int] = (),
    ) -> TokenizerSpec:
        settings = {**jsonlib.loads(content), "truncation": None, "padding": None}
        text = jsonlib.dumps(settings, ensure_ascii=False)
        try:
            vocabulary = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises a bare Exception for anything that it cannot parse
            raise ModelError(f"the tokenizer cannot be read: {error}", where=str(folder)) from error
        size, known_by = max(vocabulary.values()) + 1, fingerprint(settings)
        return cls(text, folder, eos_token_id, size, known_by, bos_token_id, tuple(prefix))

    def token(self, number: int) -> str:
        """The text of a token. The spec must have its json."""
        return str(tokenizers.Tokenizer.from_str(self.json).id_to_token(number))

    def to_json(self) -> dict[str, Any]:
        named = {key: value for key, value in asdict(self).items() if key != "json"}
        return {**named, "folder": str(self.folder)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TokenizerSpec:
        return cls(json="", **{**value, "prefix": tuple(value.get("prefix", ()))})


class Tokenizer(ABC):
    backend: ClassVar[str]

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._dtype = token_dtype(spec.vocab_size)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        """N texts -> (ids [M] uint16 or uint32, offsets int64 [N+1] into them)."""


class Reference(Tokenizer):
    """The tokenizers library, whose ids are the right ones."""

    backend = "tokenizers"

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self.spec.json)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        offsets = np.cumsum([0, *(len(encoding.ids) for encoding in encodings)], dtype=np.int64)
        flat = chain.from_iterable(encoding.ids for encoding in encodings)
        return np.fromiter(flat, self._dtype, int(offsets[-1])), offsets


class Fast(Tokenizer):
    """fastokens. It refuses a byte that the vocabulary lacks, while the reference drops it: the reference
    encodes such texts. The constructor raises ValueError for a kind of tokenizer that it does not know."""

    backend = "fastokens"

    def __init__(self, spec: TokenizerSpec) -> None:
        import fastokens

        super().__init__(spec)
        self.reference = Reference(spec)
        self._tokenizer = fastokens.Tokenizer.from_json_str(spec.json)

    def encode_batch(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        try:
            ids, offsets = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        except ValueError:
            return self._encode_halves(texts)
        return np.frombuffer(ids, "<u4").astype(self._dtype), np.frombuffer(offsets, "<u8").astype(np.int64)

    def _encode_halves(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        """Narrows the refusal down to single texts, which the reference encodes."""
        if len(texts) == 1:
            return self.reference.encode_batch(texts)
        middle = len(texts) // 2
        (left, starts), (right, ends) = self.encode_batch(texts[:middle]), self.encode_batch(texts[middle:])
        return np.concatenate([left, right]), np.concatenate([starts, ends[1:] + starts[-1]])


def open_tokenizer(source: TokenizerSpec | Path, sample_texts: Sequence[str] = ()) -> Tokenizer:
    """fastokens if its ids equal the reference's on all of Unicode and on the sample, else the reference.

    source: a spec, or a folder that `train_tokenizer` wrote.
    """
    spec = source if isinstance(source, TokenizerSpec) else _read(source)
    fast = _proven(spec)
    return fast if fast and _agree(fast, fast.reference, sample_texts) else Reference(spec)


def load_tokenizer(spec: TokenizerSpec, backend: str) -> Tokenizer:
    """The tokenizer with the backend that `open_tokenizer` chose, without comparing again."""
    return Fast(spec) if backend == Fast.backend else Reference(spec)


def _read(folder: Path) -> TokenizerSpec:
    """The tokenizer in a folder that `train_tokenizer` wrote, without loading transformers."""
    check_trained(folder)
    content = (folder / "tokenizer.json").read_text("utf-8")
    eos = tokenizers.Tokenizer.from_str(content).token_to_id(EOS)
    return TokenizerSpec.from_content(content, folder, eos, bos_token_id=eos)


@functools.lru_cache(maxsize=2)
def _proven(spec: TokenizerSpec) -> Fast | None:
    """fastokens if it passes the sweep, which takes about a second: once per process and tokenizer."""
    try:
        fast = Fast(spec)
    except ValueError:
        return None
    return fast if _agree(fast, fast.reference, (*unicode_sweep(), *_around_added(spec))) else None


def _around_added(spec: TokenizerSpec) -> list[str]:
    """Texts with each token that was added to the vocabulary: alone, within words, twice."""
    added = [token["content"] for token in jsonlib.loads(spec.json).get("added_tokens", ())]
    return [text for token in added for text in (token, f"a {token} b", f"a{token}b{token}{token} ")]


def _agree(fast: Tokenizer, reference: Tokenizer, texts: Sequence[str]) -> bool:
    try:
        pairs = zip(fast.encode_batch(texts), reference.encode_batch(texts), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it derives from BaseException
            raise
        return False


@functools.cache
def unicode_sweep() -> tuple[str, ...]:
    """Every assigned code point next to its neighbours, between spaces and after a letter; and odd texts:
    control characters, line ends, long runs, emoji, combining marks, mixed scripts, special tokens."""
    points = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    chunks = [points[i : i + 64] for i in range(0, len(points), 64)]
    swept = [joiner.join(chunk) for chunk in chunks for joiner in ("", " ", "a")]
    return (*swept, *points[:256], *_ODD)


_RUNS = (" ", "\t", "\n", "\r\n", "\0", "1", "a", "é", "!", "あ", "= ", "\u3000")
_ODD = (
    "",
    *(mark * n for mark in _RUNS for n in (2, 3, 99, 999)),
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️ ☠︎",
    "e\u0301\u0323 o\u0308\u0304 \u1e69 s\u0323\u0307 \u0344 क्षि ക്ഷ กำ ﷺ ﬁ Å Å ½ ① Ⅷ",
    "don't DON'T we\u2019ll I'm they're o'clock 'tis it's' ''",
    "1234567890.123,456 0x1F 1e-9 ١٢٣ १२३ 一二三 2026-01-31T10:20:30Z",
    "line\r\n\r\n next\n\n\tdef f(x):\n        return x  # done  \n  ",
    "English \u0440\u0443\u0441 ελληνικά עברית العربية 中文 日本語 한국어 ไทย हिन्दी mixed\u0421\u043c",
    "\ufeffbom \u200bzero\u200dwidth\u2060 \u202eright\u202c \u2028line\u2029 \x85 \xa0nbsp \xad soft",
    "\ufffd \U000f0000 \ue000 \x7f \x1b[0m",
    "<s>a</s> <|endoftext|>b<|im_start|>user [CLS] [SEP] <pad> <unk> <bos> <eos> <0x0A> ▁a Ġb",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE and save it as a Hugging Face folder. Equal texts give equal bytes.

    The vocabulary has `vocab_size` entries, or fewer if the texts do not have that many pairs.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(jsonlib.dumps(settings, indent=2) + "\n", "utf-8")
    _seal(folder)
    return folder


def _seal(folder: Path) -> None:
    write_sealed(folder / CHECKSUMS, {path.name: measure(path) for path in sorted(folder.iterdir())})


def check_trained(folder: Path) -> None:
    """Raises ModelError where a tokenizer that was trained or extended here is not as it was written.

    Any other folder passes, and one of an older version, which has no checksums.
    """
    _is_there(folder)
    if not (folder / CHECKSUMS).exists():
        return
    fix = f"remove the folder {folder}: the tokenizer is made again, and is the same for the same files"
    for name, expected in read_sealed(folder / CHECKSUMS, ModelError, fix).items():
        actual = measure(folder / name) if (folder / name).is_file() else None
        if actual != expected:
            why = f"its bytes are not those that were written: {actual}, not {expected}"
            raise ModelError(f"the tokenizer's {name} is damaged", where=str(folder / name), why=why, fix=fix)


def open_pretrained(name: str | Path) -> Any:
    """The tokenizer of a hub id or folder by transformers, without its code; with the ids of sentencepiece
    itself where it is stored as a SentencePiece model alone.

    Raises what AutoTokenizer does, and ModelError for a SentencePiece model that cannot be read.
    """
    if isinstance(name, Path) or Path(name).is_absolute():
        _is_there(Path(name))
    from transformers import AutoTokenizer

    stored = sentencepiece.model_in(Path(name))
    if stored is not None:
        sentencepiece.open_model(stored)  # transformers would take a damaged one for another format
    loaded: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    stored = stored or _downloaded(loaded)
    return loaded if stored is None or not loaded.is_fast else sentencepiece.faithful(loaded, stored)


def _downloaded(loaded: Any) -> Path | None:
    """The SentencePiece model that a hub's tokenizer was made of; None for a tokenizer.json."""
    file = loaded.init_kwargs.get("vocab_file")
    return sentencepiece.model_in(Path(file).parent) if file else None


def pretrained_tokenizer(name: str) -> TokenizerSpec:
    """The tokenizer of a hub id or folder, see `open_pretrained`. Raises ModelError for one without."""
    return _spec_of(*_open_usable(name))


def _open_usable(name: str) -> tuple[Any, Path | str]:
    """The tokenizer, and where it is loaded from. Raises ModelError for one that cannot be used."""
    path = Path(name).expanduser()
    folder = path if path.is_dir() else name
    where = str(folder)
    if problem := oversized(path):
        raise ModelError(
            problem, where="model.tokenizer or model.base", fix="copy the tokenizer from its source again"
        )
    try:
        loaded = open_pretrained(where)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"no tokenizer can be loaded from {where}",
            where="model.tokenizer or model.base",
            why=str(error).strip().split("\n")[0],
            fix="give a hub id that this machine can reach, or a folder with tokenizer.json"
            " or tokenizer.model",
        ) from error
    if not loaded.is_fast:
        raise ModelError(
            f"the tokenizer of {where} has no tokenizer.json, only Python code",
            where="model.tokenizer",
            why="raydist encodes with the tokenizers library",
            fix="convert it with transformers.convert_slow_tokenizer and name the folder in model.tokenizer",
        )
    return loaded, folder


def _spec_of(loaded: Any, folder: Path | str) -> TokenizerSpec:
    content = loaded.backend_tokenizer.to_str()
    return TokenizerSpec.from_content(
        content, folder, loaded.eos_token_id, loaded.bos_token_id, _prefix(loaded)
    )


def with_tokens(name: str, tokens: Sequence[str], storage: Storage, *, write: bool = True) -> TokenizerSpec:
    """The tokenizer of a hub id or folder with further tokens behind its own, in a folder of the storage.

    The tokens are ordinary ones: they are found within texts. What decides the folder's content names it.
    write: make it where it is missing. Raises JobError for a token that the tokenizer has already.
    """
    loaded, at = _open_usable(name)
    vocabulary = loaded.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        raise JobError(
            f"the tokenizer has {', '.join(map(repr, known))} already",
            where="model.add_tokens",
            why="only tokens that are new get rows in the embedding",
            fix="take them out of the list",
        )
    before = {key: value for key, value in _spec_of(loaded, at).to_json().items() if key != "folder"}
    folder = storage.tokenizers / fingerprint({"tokenizer": before, "add_tokens": list(tokens)})
    loaded.add_tokens(list(tokens))
    if write and not _is_there(folder):
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
        loaded.save_pretrained(temporary)
        _seal(temporary)
        _move(temporary, folder)
    if not _is_there(folder):
        return _spec_of(loaded, folder)
    check_trained(folder)
    return pretrained_tokenizer(str(folder))


def _prefix(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer of transformers puts in front of a text, as it is called by default.

    Found by calling it: templates, settings and code of its class all have a say in it.
    """
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(_PROBE)["input_ids"]
    begins = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in begins if bare and whole[i : i + len(bare)] == bare), 0)]


_PROBE = "a"


def document_start(job: Job, tokenizer: TokenizerSpec) -> int | None:
    """The id that the feed puts in front of each document by packing.add_bos_token; None for none.

    Raises JobError where the tokenizer has no such token.
    """
    asked, where = job.packing.add_bos_token, "packing.add_bos_token"
    if asked is False:
        return None
    if asked == "auto":
        if len(tokenizer.prefix) > 1:
            raise JobError(
                f"the tokenizer puts {len(tokenizer.prefix)} tokens in front of a text",
                where=where,
                why=f"auto adds the same as the tokenizer, and a document can begin with one token only:"
                f" {', '.join(map(tokenizer.token, tokenizer.prefix))}",
                fix=f"set {where}: false, or true for the tokenizer's BOS token alone",
            )
        return next(iter(tokenizer.prefix), None)
    if tokenizer.bos_token_id is None:
        raise JobError(
            "the tokenizer has no beginning-of-sequence token",
            where=where,
            why="true begins every document with it",
            fix=f"set {where}: auto, or use a tokenizer whose tokenizer_config.json names a bos_token",
        )
    return tokenizer.bos_token_id


def _checked(job: Job, tokenizer: TokenizerSpec) -> TokenizerSpec:
    """Raises JobError where it lacks a token that the packing adds: nothing is tokenized in vain."""
    document_start(job, tokenizer)
    if job.packing.add_eos_token and tokenizer.eos_token_id is None:
        raise JobError(
            "the tokenizer has no end-of-sequence token",
            where="packing.add_eos_token",
            why="it ends every document with that token",
            fix="set packing.add_eos_token: false, or use a tokenizer whose tokenizer_config.json names an"
            " eos_token",
        )
    return tokenizer


def resolve_tokenizer(job: Job, storage: Storage) -> TokenizerSpec:
    """The tokenizer of `job`: the one that it names, its base's, or one trained on a sample of its corpus;
    with the tokens that the job adds.

    A trained or extended one is kept in the storage under the fingerprint of its inputs, and used again.
    Raises JobError where it lacks a token that the packing adds.
    """
    asked = _asked(job)
    if isinstance(asked, str):
        return _checked(job, _pretrained(job, asked, storage, write=True))
    sources, folder = _trained(job, storage)
    if not _is_there(folder):
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
        train_tokenizer(_sample(sources, job.corpus.holdout), asked.train.vocab_size, temporary)
        _move(temporary, folder)
    return _read(folder)


def planned_tokenizer(job: Job, storage: Storage) -> TokenizerSpec | None:
    """Like `resolve_tokenizer`, but writes none: None if the tokenizer is still to be trained."""
    asked = _asked(job)
    if isinstance(asked, str):
        return _checked(job, _pretrained(job, asked, storage, write=False))
    _, folder = _trained(job, storage)
    return _read(folder) if _is_there(folder) else None


def _asked(job: Job) -> str | NewTokenizer:
    """What the tokenizer is made of."""
    added = job.model.add_tokens
    asked = added if isinstance(added, str) else job.model.tokenizer or job.model.base
    assert asked is not None  # the schema gives a model from a config a tokenizer
    return asked


def _pretrained(job: Job, asked: str, storage: Storage, *, write: bool) -> TokenizerSpec:
    tokens = job.model.add_tokens
    if isinstance(tokens, list) and tokens:
        return with_tokens(asked, tokens, storage, write=write)
    return pretrained_tokenizer(asked)


def _trained(job: Job, storage: Storage) -> tuple[list[SourceFiles], Path]:
    """The sources that a tokenizer is trained on, and the folder that it is or will be in."""
    assert isinstance(job.model.tokenizer, NewTokenizer)
    sources = [open_source(source, job.corpus) for source in job.corpus.sources.values()]
    inputs = {
        "vocab_size": job.model.tokenizer.train.vocab_size,
        "sample_bytes": SAMPLE_BYTES,
        "holdout": job.corpus.holdout,
        "sources": [source.identity() for source in sources],
    }
    return sources, storage.tokenizers / fingerprint(inputs)


def _sample(sources: Sequence[SourceFiles], holdout: float) -> Iterator[str]:
    """The first documents of each source in planned order, without those held out for evaluation."""
    n_bytes = 0
    for i, source in enumerate(sources, start=1):
        enough = SAMPLE_BYTES * i / len(sources)
        for slice_ in source.plan():
            with unchanged(source.files_of(slice_)):
                for text in source.texts([slice_]):
                    encoded = text.encode()
                    first_8_bytes = xxhash.xxh3_128_intdigest(encoded) >> 64
                    if not held_out(np.array([first_8_bytes], np.uint64), holdout)[0]:
                        yield text
                        n_bytes += len(encoded)
                    if n_bytes >= enough:
                        break
            if n_bytes >= enough:
                break
    if n_bytes == 0:
        raise EmptyCorpus(
            "there is no text to train a tokenizer on",
            where="corpus.sources",
            why="no readable document is left after cleaning and holdout",
            fix="check path, text_column and clean of the sources",
        )


def _is_there(folder: Path) -> bool:
    """Whether a tokenizer's folder is on this node, which gets it from its bucket where it is in one."""
    if not folder.exists() and CHECKSUMS in mirror.names_in(folder):
        mirror.pull(folder)
    return folder.exists()


def _move(temporary: Path, folder: Path) -> None:
    """Rename a finished folder into place. Another process may have been faster, with the same content."""
    for file in temporary.iterdir():
        flush_to_disk(file)
    flush_to_disk(temporary)
    mirror.publish_folder(folder, source=temporary, last=CHECKSUMS)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)
    flush_to_disk(folder.parent)
