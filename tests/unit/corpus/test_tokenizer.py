"""Tokenizers: the reference's ids whatever the backend, special tokens as text, deterministic training."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raydist.corpus.tokenizer import (
    EOS,
    Fast,
    Reference,
    Tokenizer,
    TokenizerSpec,
    document_start,
    load_tokenizer,
    open_tokenizer,
    planned_tokenizer,
    pretrained_tokenizer,
    resolve_tokenizer,
    train_tokenizer,
    unicode_sweep,
    with_tokens,
)
from raydist.errors import EmptyCorpus, JobError, ModelError
from raydist.job.schema import Job
from raydist.storage import Storage

TEXTS = [
    f"The {word} of page {i} isn't theirs; naïve café 数{i}.\n"
    for i in range(200)
    for word in ("end", "start")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return value


def spec_of(content: dict[str, Any]) -> TokenizerSpec:
    return TokenizerSpec.from_content(json.dumps(content), "", None)


def reference_ids(content: dict[str, Any], text: str) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    flat, offsets = tokenizer.encode_batch([text])
    assert offsets.tolist() == [0, len(flat)]
    return [int(i) for i in flat]


def test_a_trained_tokenizer_is_fast_and_equals_the_reference(folder: Path, content: dict[str, Any]) -> None:
    tokenizer = open_tokenizer(folder, TEXTS)
    assert tokenizer.backend == "fastokens"
    assert (tokenizer.spec.vocab_size, tokenizer.spec.eos_token_id) == (400, content["model"]["vocab"][EOS])
    flat, offsets = tokenizer.encode_batch(TEXTS[:3])
    assert flat.dtype == np.uint16 and offsets.dtype == np.int64
    got = [flat[a:b].tolist() for a, b in pairwise(offsets)]
    assert got == [reference_ids(content, text) for text in TEXTS[:3]]


@pytest.mark.parametrize("backend", ["fastokens", "tokenizers"])
def test_special_tokens_inside_a_text_are_text(folder: Path, content: dict[str, Any], backend: str) -> None:
    tokenizer = load_tokenizer(open_tokenizer(folder).spec, backend)
    found = ids(tokenizer, f"a{EOS}b")
    assert tokenizer.backend == backend
    assert len(found) > 3 and tokenizer.spec.eos_token_id not in found
    assert (
        tokenizers.Tokenizer.from_str(json.dumps(content)).decode(found, skip_special_tokens=False)
        == f"a{EOS}b"
    )


@pytest.mark.parametrize("backend", ["fastokens", "tokenizers"])
def test_nothing_is_added_or_cut(content: dict[str, Any], backend: str) -> None:
    eos = content["model"]["vocab"][EOS]
    template = [{"SpecialToken": {"id": EOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    changed = {
        **content,
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {EOS: {"id": EOS, "ids": [eos], "tokens": [EOS]}},
        },
    }
    assert ids(load_tokenizer(spec_of(changed), backend), TEXTS[0]) == reference_ids(content, TEXTS[0])


def test_a_byte_that_the_vocabulary_lacks(content: dict[str, Any]) -> None:
    """fastokens refuses it, the reference drops it: only texts that hold it take the slow way."""
    model = {**content["model"], "vocab": dict(content["model"]["vocab"])}
    model["vocab"]["<unused>"] = model["vocab"].pop("Ą")  # byte 4 in the byte-level alphabet
    lacking = {**content, "model": model}
    tokenizer = open_tokenizer(spec_of(lacking), TEXTS)
    assert tokenizer.backend == "fastokens"
    texts = ["one", "two\x04three", "four", "\x04", "five"]
    flat, offsets = tokenizer.encode_batch(texts)
    assert [flat[a:b].tolist() for a, b in pairwise(offsets)] == [
        reference_ids(lacking, text) for text in texts
    ]


def test_the_reference_is_used_where_fastokens_differs(content: dict[str, Any]) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert open_tokenizer(spec_of(json.loads(words.to_str()))).backend == "tokenizers"
    from raydist.corpus import tokenizer as module

    fewer = {**content["model"], "merges": content["model"]["merges"][:50]}
    other = spec_of({**content, "model": fewer})
    assert not module._agree(Fast(spec_of(content)), Reference(other), TEXTS)


def test_the_sweep_covers_unicode() -> None:
    swept = "".join(unicode_sweep())
    for character in ("\0", "\r\n", "é", "e\u0301", "\u0915\u094d\u0937", "\U0001f468\u200d\U0001f469"):
        assert character in swept
    assert len(set(swept)) > 140_000


def test_vocabulary_counts_added_tokens_and_decides_the_dtype(content: dict[str, Any]) -> None:
    added = {**content["added_tokens"][0], "id": 70_000, "content": "<far>"}
    model = {**content["model"], "vocab": {**content["model"]["vocab"], "<far>": 70_000}}
    spec = spec_of({**content, "model": model, "added_tokens": [*content["added_tokens"], added]})
    assert spec.vocab_size == 70_001
    assert Reference(spec).encode_batch(["a"])[0].dtype == np.uint32


def test_training_is_deterministic_and_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, 400, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    spec = pretrained_tokenizer(str(again))
    assert spec.eos_token_id == open_tokenizer(folder).spec.eos_token_id
    text = TEXTS[7] + "x = [\t1]"
    assert ids(Reference(spec), text) == ids(open_tokenizer(folder), text)


def put_in_front(folder: Path, target: Path, *tokens: str) -> Path:
    """The tokenizer in `folder` with these tokens in front of each text, as LLaMA 3's and Gemma's have it."""
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens([*tokens, "<end>"])
    named = [(token, core.token_to_id(token)) for token in (*tokens, "<end>")]
    template = TemplateProcessing(single=f"{' '.join(tokens)} $A", pair=None, special_tokens=named)
    core.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    options = {"bos_token": tokens[-1]} if tokens else {}
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", **options).save_pretrained(target)
    return target


def packed(folder: Path, **packing: Any) -> Job:
    job = a_job(folder)
    return job.model_copy(update={"packing": job.packing.model_copy(update=packing)})


def test_a_document_begins_as_the_tokenizer_begins_a_text(folder: Path, tmp_path: Path) -> None:
    """Whatever its settings call it: the tokenizer is asked."""
    spec = pretrained_tokenizer(str(put_in_front(folder, tmp_path / "one", "<s>")))
    begin = AutoTokenizer.from_pretrained(tmp_path / "one")("hi")["input_ids"][0]
    assert spec.token(begin) == "<s>" and (spec.prefix, spec.bos_token_id) == ((begin,), begin)
    assert document_start(packed(tmp_path), spec) == begin
    assert document_start(packed(tmp_path, add_bos_token=False), spec) is None
    assert begin not in Reference(spec).encode_batch(["hi"])[0]  # it is not in the token log
    assert TokenizerSpec.from_json(json.loads(json.dumps(spec.to_json()))).prefix == (begin,)
    plain = pretrained_tokenizer(str(folder))
    assert plain.prefix == () and document_start(packed(tmp_path), plain) is None
    assert document_start(packed(tmp_path, add_bos_token=True), plain) == plain.bos_token_id


def test_what_a_document_cannot_begin_or_end_with_is_refused(folder: Path, tmp_path: Path) -> None:
    two = pretrained_tokenizer(str(put_in_front(folder, tmp_path / "two", "[MASK]", "<sop>")))
    with pytest.raises(JobError, match="puts 2 tokens in front") as refused:
        document_start(packed(tmp_path), two)
    assert "[MASK], <sop>" in refused.value.why and "add_bos_token: false" in refused.value.fix
    assert document_start(packed(tmp_path, add_bos_token=True), two) == two.prefix[1]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("none", "nothing"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    job = packed(tmp_path, add_bos_token=True, add_eos_token=False)
    named = job.model.model_copy(update={"tokenizer": str(tmp_path / "none")})
    with pytest.raises(JobError, match="no beginning-of-sequence token"):
        planned_tokenizer(job.model_copy(update={"model": named}), Storage(tmp_path))
    job = packed(tmp_path).model_copy(update={"model": named})
    with pytest.raises(JobError, match="no end-of-sequence token") as ends:  # before anything is tokenized
        resolve_tokenizer(job, Storage(tmp_path))
    assert "add_eos_token: false" in ends.value.fix


def test_new_tokens_stand_behind_the_tokenizers_own_and_are_found_in_texts(
    folder: Path, tmp_path: Path
) -> None:
    plain, storage = pretrained_tokenizer(str(folder)), Storage(tmp_path / "runs")
    tokens = ["<gene>", "naïve café"]
    named = a_job(tmp_path).model.model_copy(
        update={"base": str(folder), "config": None, "tokenizer": None, "add_tokens": tokens}
    )
    job = a_job(tmp_path).model_copy(update={"model": named})
    planned = planned_tokenizer(job, storage)
    assert planned is not None and not storage.tokenizers.exists()  # a plan writes nothing
    spec = resolve_tokenizer(job, storage)
    assert (planned.fingerprint, planned.folder) == (spec.fingerprint, spec.folder)
    assert spec.fingerprint != plain.fingerprint and spec.vocab_size == plain.vocab_size + 2
    text = "a <gene>x<gene> naïve café, naïve"
    tokenizer = open_tokenizer(spec, [text])
    found = ids(tokenizer, text)
    assert found == ids(Reference(spec), text)
    assert [i for i in found if i >= plain.vocab_size] == [400, 400, 401]
    assert ids(Reference(spec), "no such") == ids(Reference(plain), "no such")
    assert pretrained_tokenizer(str(spec.folder)).fingerprint == spec.fingerprint
    assert AutoTokenizer.from_pretrained(spec.folder).convert_ids_to_tokens([400, 401]) == tokens
    with pytest.raises(JobError, match="has '<gene>' already"):
        with_tokens(str(spec.folder), ["<gene>", "other"], storage)


def test_spec_names_itself_in_json(folder: Path) -> None:
    spec = open_tokenizer(folder).spec
    named = TokenizerSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert (named.fingerprint, named.vocab_size, named.eos_token_id) == (
        spec.fingerprint,
        spec.vocab_size,
        spec.eos_token_id,
    )


def test_no_tokenizer_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no tokenizer can be loaded") as caught:
        pretrained_tokenizer(str(tmp_path))
    assert "tokenizer.json" in caught.value.fix


def a_job(folder: Path, **corpus: Any) -> Job:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    return Job.model_validate(
        {
            "name": "a",
            "model": {"config": {"model_type": "llama"}, "tokenizer": {"train": {"vocab_size": 350}}},
            "corpus": {"sources": {"a": {"path": str(folder / "text.jsonl")}}, **corpus},
            "train": {"max_steps": 1},
        }
    )


def test_a_job_trains_its_tokenizer_once(tmp_path: Path) -> None:
    job = a_job(tmp_path, holdout=0.25)
    assert planned_tokenizer(job, Storage(tmp_path)) is None
    spec = resolve_tokenizer(job, Storage(tmp_path))
    assert spec.vocab_size == 350 and spec.eos_token_id is not None
    assert Path(spec.folder).parent == tmp_path / "tokenizers"
    written = (Path(spec.folder) / "tokenizer.json").stat().st_mtime_ns
    assert resolve_tokenizer(job, Storage(tmp_path)) == planned_tokenizer(job, Storage(tmp_path)) == spec
    assert (Path(spec.folder) / "tokenizer.json").stat().st_mtime_ns == written
    assert list((tmp_path / "tokenizers").iterdir()) == [Path(spec.folder)]
    other = resolve_tokenizer(a_job(tmp_path, holdout=0.5), Storage(tmp_path))
    assert other.folder != spec.folder
    altered = Path(spec.folder) / "tokenizer.json"
    altered.write_bytes(altered.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged") as refused:
        resolve_tokenizer(job, Storage(tmp_path))
    assert str(spec.folder) in refused.value.fix


def test_held_out_documents_do_not_train_the_tokenizer(tmp_path: Path) -> None:
    import xxhash

    from raydist.corpus import tokenizer as module
    from raydist.corpus.source import open_source

    job = a_job(tmp_path, holdout=0.25)
    source = open_source(job.corpus.sources["a"], job.corpus)
    sample = set(module._sample([source], 0.25))
    held_out = {text for text in TEXTS if xxhash.xxh3_128_digest(text.encode())[0] < 0x100 * 0.25}
    assert held_out and sample == set(TEXTS) - held_out


def test_no_text_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(EmptyCorpus, match="no text to train a tokenizer"):
        resolve_tokenizer(a_job(tmp_path, clean=[{"min_words": {"count": 1000}}]), Storage(tmp_path))
