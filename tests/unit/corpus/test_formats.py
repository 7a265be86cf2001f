"""Every reader keeps every value as it is, and says what it cannot read."""

import bz2
import csv
import gzip
import json
import lzma
import re
import struct
from typing import get_args

import fsspec
import orjson
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from raydist.corpus.files import list_files
from raydist.corpus.formats import (
    READERS,
    Bad,
    ByteRecord,
    Part,
    ReadOptions,
    Record,
    check_column,
    cut_file,
    read_part,
    streams,
)
from raydist.corpus.formats import csv as csv_format
from raydist.corpus.formats import json as json_format
from raydist.corpus.formats import text as text_format
from raydist.corpus.formats.reader import Reader, cut_lines
from raydist.corpus.formats.streams import COMPRESSIONS, blocks, whole_lines
from raydist.corpus.slices import plan_slices
from raydist.corpus.source import open_source
from raydist.errors import CorpusError
from raydist.job.schema import Corpus, Encoding, Format, Source

TEXTS = [
    "0012",
    "123",
    "2020-01-01",
    "1e5",
    "null",
    'say "hi", then\nleave',
    "a\u2028b\x0cc\x85d",
    "naïve 日本 🎉",
    " padded\t",
    "",
    "\\n \\u0041",
    "x" * 70_000,
    'tail }, { "text": 1',
]


def read(path, column="text", document="line", fmt="auto", part=None, **more):
    (file,) = list_files(Source(path=str(path), format=fmt))
    chunks = list(read_part(file, part or Part(0, 0, -1), ReadOptions(fmt, column, document, **more)))
    assert all(chunks)
    return [item for chunk in chunks for item in chunk]


def texts(items):
    assert not [item for item in items if isinstance(item, Bad)]
    return [item.text for item in items]


def bads(items):
    return [item for item in items if isinstance(item, Bad)]


def lines_of(records):
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def write(folder, name, records):
    """`records` as the format that the name says."""
    path = folder / name
    table = pa.table(
        {"id": [r["id"] for r in records], "text": pa.array([r["text"] for r in records], pa.string())}
    )
    if "jsonl" in name:
        raw = lines_of(records)
    elif "json" in name:
        raw = json.dumps(records, indent=2 if "pretty" in name else None).encode()
    elif ".csv" in name:
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["id", "text"], *[[r["id"], r["text"]] for r in records]])
        raw = path.read_bytes()
    elif name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=4)
        return path
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=5)
        return path
    elif name.endswith(".ipc"):
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table)
        return path
    else:
        pyarrow.feather.write_feather(table, path, compression="zstd")
        return path
    packs = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.compress, "xz": lzma.compress}
    pack = (packs | {"lz4": pack_lz4}).get(name.rsplit(".", 1)[1], bytes)
    path.write_bytes(pack(raw))
    return path


NAMES = [
    *["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.json", "a.pretty.json", "a.json.gz"],
    *["a.csv", "a.csv.zst", "a.parquet", "a.arrow", "a.ipc", "a.feather"],
]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_documents_give_the_same_texts_in_every_format(tmp_path, name):
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    items = read(write(tmp_path, name, records))
    assert texts(items) == TEXTS
    rows = [item.row for item in items]
    assert rows == sorted(set(rows))
    if not ("jsonl" in name or "csv" in name):
        assert rows == list(range(len(TEXTS)))


def test_rows_of_lines_are_byte_offsets_also_after_decompression(tmp_path):
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    raw = lines_of(records)
    for name in ["a.jsonl", "a.jsonl.gz"]:
        for item in read(write(tmp_path, name, records)):
            assert orjson.loads(raw[item.row :].split(b"\n")[0])["text"] == item.text


def test_rows_of_csv_are_byte_offsets_of_the_records(tmp_path):
    path = write(tmp_path, "a.csv", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    raw = path.read_bytes()
    assert [raw[item.row :].split(b",")[0] for item in read(path)] == [
        str(i).encode() for i in range(len(TEXTS))
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_large_files_come_in_bounded_lists(tmp_path, name):
    records = [
        {"id": i, "text": f"{i} " + "word, \n" * 1000, "tags": [{"a": 1}, {"b": i}]} for i in range(2500)
    ]
    (file,) = list_files(Source(path=str(write(tmp_path, name, records))))
    chunks = list(read_part(file, Part(0, 0, -1), ReadOptions("auto", "text", "line")))
    assert [item.text for chunk in chunks for item in chunk] == [record["text"] for record in records]
    assert len(chunks) > 2
    assert max(sum(len(item.text) for item in chunk) for chunk in chunks) < 9 * 2**20


# --- text


def test_lines_split_at_newlines_only_and_skip_blank_ones(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\u2028still\x0cone\r\n\r\n \t\ntwo\r\r\n\nlast é".encode())
    items = read(path)
    assert texts(items) == ["one\u2028still\x0cone", "two\r", "last é"]
    raw = path.read_bytes()
    assert [raw[item.row :][:3] for item in items] == [b"one", b"two", b"las"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_paragraphs_keep_inner_lines(tmp_path, newline):
    path = tmp_path / "a.txt"
    lines = ["", "  ", "one", " still one", "", "\t", "two", "", "", "three", " "]
    path.write_bytes(newline.join(lines).encode())
    items = read(path, document="paragraph")
    assert texts(items) == [f"one{newline} still one", "two", "three"]
    assert [path.read_bytes()[item.row :][:2] for item in items] == [b"on", b"tw", b"th"]


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_a_text_file_of_blank_lines_has_no_document(tmp_path, document):
    (tmp_path / "a.txt").write_text("\n \n\n")
    (tmp_path / "b.txt").write_text("")
    assert read(tmp_path / "a.txt", document=document) == []
    assert read(tmp_path / "b.txt", document=document) == []


def test_whole_files_are_documents_as_they_are(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfdef f():\r\n\n\tpass\n")
    (tmp_path / "b.md").write_text("")
    assert read(tmp_path / "a.py", document="file") == [Record("def f():\r\n\n\tpass\n", 0)]
    assert read(tmp_path / "b.md", document="file") == [Record("", 0)]


def test_invalid_utf8_spoils_its_own_document_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nab\xffcd\ng\xc3\xa9\n")
    assert read(tmp_path / "a.txt") == [
        Record("good", 0),
        Bad(5, "invalid UTF-8 at byte 2 of the record", "byte"),
        Record("gé", 11),
    ]
    (tmp_path / "p.txt").write_bytes(b"good\n\nab\xffcd\n\ngood\n\n")
    assert [type(item) for item in read(tmp_path / "p.txt", document="paragraph")] == [
        ByteRecord,
        Bad,
        ByteRecord,
    ]
    assert read(tmp_path / "a.txt", document="file") == [
        Bad(0, "invalid UTF-8 at byte 7 of the record", "byte")
    ]


# --- JSON


BAD_LINES = [
    (b'{"text": "a\xff"}', "invalid UTF-8 at byte 11 of the record"),
    (b'{"text": "torn', "invalid JSON: unexpected end of data at character 14 of the record"),
    (b'{"text": null}', "text is null"),
    (b'{"text": 12}', "text is a number, not a string"),
    (b'{"text": true}', "text is a boolean, not a string"),
    (b'{"text": ["a"]}', "text is an array, not a string"),
    (b'{"text": "\\ud800"}', "text has half of a surrogate pair, which is no character"),
    (b'{"text": NaN}', "text is NaN"),
    (b'{"text": Infinity}', "text is a number, not a string"),
    (b'{"text": "a", "n": NaNa}', "invalid JSON"),
    (b'{"text": "a", "n": NaN} {}', "invalid JSON"),
    (b'{"a": 1, "b": 2}', "no field 'text' (fields: a, b)"),
    (b'"text"', "the record is a string, not an object"),
    (b"7", "the record is a number, not an object"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_one_bad_record(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n\n{"text": "after"}\r\n')
    before, bad, after = read(tmp_path / "a.jsonl")
    assert (before, after.text) == (Record("before", 0), "after")
    assert isinstance(bad, Bad)
    assert (bad.row, bad.unit) == (19, "byte")
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize(("element", "reason"), [pair for pair in BAD_LINES if b"torn" not in pair[0]])
def test_a_bad_element_of_an_array_is_one_bad_record(tmp_path, element, reason):
    (tmp_path / "a.json").write_bytes(b' [ {"text": "before"},\n' + element + b' , {"text": "after"} ]\n')
    before, bad, after = read(tmp_path / "a.json")
    assert (before, after) == (Record("before", 0), Record("after", 2))
    assert isinstance(bad, Bad)
    assert (bad.row, bad.unit) == (1, "row")
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("tail", [b"", b', {"text": "b"', b', {"text": "b', b'] {"text": 1}', b"]]"])
def test_an_array_that_does_not_end_well_is_said_after_its_records(tmp_path, tail):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "c"}, {"text": "d"}' + tail)
    items = read(tmp_path / "a.json")
    assert [item.text for item in items if isinstance(item, Record)][:2] == ["a", "c"]
    (bad,) = bads(items)
    assert bad.row is None
    assert "array" in bad.reason


@pytest.mark.parametrize("raw", [b"[]", b" [ \n ] \n", b""])
def test_an_empty_json_file_has_no_records(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    assert read(tmp_path / "a.json") == []


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n{"text": "b"}\n')
    assert texts(read(tmp_path / "a.json")) == ["a", "b"]


@pytest.mark.parametrize("shape", ["object", "array"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_json_file_of_columns_as_pandas_writes_it_gives_its_rows_in_order(tmp_path, shape, pack):
    values = {str(n): text for n, text in enumerate(TEXTS * 100)}
    columns = {"id": dict.fromkeys(values, 1), "text": values if shape == "object" else [*values.values()]}
    path = tmp_path / ("a.json" if pack is bytes else "a.json.gz")
    path.write_bytes(pack(orjson.dumps(columns)))
    items = read(path)
    assert texts(items) == TEXTS * 100
    assert [item.row for item in items] == list(range(len(items)))
    if pack is bytes:
        assert read(path, part=Part(0, 0, path.stat().st_size)) == items  # as a large file is planned


def test_pandas_own_file_of_columns_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"text": TEXTS}).to_json(tmp_path / "a.json")
    assert texts(read(tmp_path / "a.json")) == TEXTS


def test_a_column_holds_strings_only(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": {"0": "a", "1": null, "2": {"b": "c"}}}')
    good, *bad = read(tmp_path / "a.json")
    assert good == Record("a", 0)
    assert [(b.row, b.reason) for b in bad] == [
        (1, "text is null"),
        (2, "text is an object, not a string"),
    ]


def test_one_object_with_a_text_is_one_document_and_columns_are_not_among_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": "alone", "tags": ["x"]}\n')
    assert texts(read(tmp_path / "a.json")) == ["alone"]
    lines = b'{"text": ["a"]}\n' + b'{"text": "b"}\n' * 3
    for name, content in [("b.json", lines), ("c.jsonl", b'{"text": ["a"]}\n')]:
        (tmp_path / name).write_bytes(content)
        assert bads(read(tmp_path / name))[0].reason == "text is an array, not a string"


def test_dots_enter_objects_and_a_name_with_the_dot_wins(tmp_path):
    records = [{"a": {"b": {"c": "deep"}}}, {"a.b.c": "literal", "a": {"b": {"c": "deep"}}}, {"a": None}]
    (tmp_path / "a.jsonl").write_bytes(lines_of(records))
    *good, bad = read(tmp_path / "a.jsonl", "a.b.c")
    assert texts(good) == ["deep", "literal"]
    assert bad.reason == "no field 'a.b.c' (fields: a)"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_that_json_has_not_spoil_no_text(tmp_path, name):
    """As json.dumps of Python writes them."""
    fields = [float("nan"), float("inf"), -float("inf"), "\ud83d", [{"a": float("nan")}]]
    records = [json.dumps({"n": n, "text": text}) for n in fields for text in TEXTS]
    content = "\n".join(records) if name == "a.jsonl" else f"[{', '.join(records)}]"
    (tmp_path / name).write_text(content)
    assert texts(read(tmp_path / name)) == TEXTS * len(fields)


def test_what_python_alone_reads_is_looked_at_as_strictly(tmp_path):
    lines = [
        b'{"text": "a", "n": NaN, "text": "b"}',
        b'{"n": NaN, "text": "\\udc00"}',
        b'{"n": NaN, "text": "\xed\xa0\x80"}',
        b'{"\\ud800": NaN}',
        b'{"text": "a", "n": NaN, "deep": ' + b"[" * 1100 + b"]" * 1100 + b"}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    reasons = [item.reason for item in read(tmp_path / "a.jsonl")]
    assert reasons[:2] == [
        "the field 'text' occurs more than once: which one holds the text is a guess",
        "text has half of a surrogate pair, which is no character",
    ]
    assert reasons[2].startswith("invalid UTF-8") and reasons[4].startswith("invalid JSON")
    assert reasons[3] == "no field 'text' (fields: \\ud800)"


def pretty(value):
    return json.dumps(value, indent=2).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_object_over_several_lines_is_one_record(tmp_path, pack):
    path = tmp_path / ("a.json" if pack is bytes else "a.json.gz")
    path.write_bytes(pack(b"\n " + pretty({"text": "alone", "n": float("nan"), "tags": ["x"]}) + b"\n\n"))
    assert read(path) == [ByteRecord("alone", 2)]
    path.write_bytes(pack(pretty({"text": {"0": "a", "1": "b"}})))
    assert read(path) == [Record("a", 0), Record("b", 1)]
    path.write_bytes(pack(pretty({"meta": {"text": "inner"}})))
    assert read(path, "meta.text") == [ByteRecord("inner", 0)]
    assert read(path)[0].reason == "no field 'text' (fields: meta)"
    path.write_bytes(pack(b'{\n"text": "a", "text": "b"}'))
    assert "more than once" in read(path)[0].reason
    path.write_bytes(pack(b'{"text": "torn\n{"text": "b"}\n{"text": "c"}\n'))
    torn, *rest = read(path)
    assert isinstance(torn, Bad) and texts(rest) == ["b", "c"]


@pytest.mark.parametrize("write_as", [pretty, orjson.dumps])
def test_a_list_inside_of_an_object_is_read_by_its_path(tmp_path, write_as):
    items = [{"text": "a"}, {"text": None}, {"body": "c"}, "d"]
    path = tmp_path / "a.json"
    path.write_bytes(write_as({"meta": {"authors": [{"name": "x"}]}, "data": {"items": items, "n": [1]}}))
    good, *bad = read(path, records="data.items")
    assert good == Record("a", 0)
    assert [(item.row, item.reason) for item in bad] == [
        (1, "text is null"),
        (2, "no field 'text' (fields: body)"),
        (3, "the record is a string, not an object"),
    ]
    (file,) = list_files(Source(path=str(path)))
    assert cut_file(file, 20, ReadOptions("auto", "text", "line", records="data.items")) == []
    options = {"path": str(path), "text_column": "text"}
    for more, what, fix in [
        ({}, "no field 'text': it is one object, with lists of records at data.items", "records"),
        ({"text_column": "z"}, "with lists of records at meta.authors, data.items", "records"),
        ({"records": "data"}, "no list at 'data', but at data.items", "records"),
    ]:
        with pytest.raises(CorpusError, match=re.escape(what)) as caught:
            open_source(Source(**{**options, **more}), Corpus(sources={"s": options}))
        assert fix in caught.value.fix


def test_records_that_occur_twice_or_not_at_all_are_not_guessed(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": [{"text": "x"}], "a": [{"text": "y"}]}')
    (bad,) = read(tmp_path / "a.json", records="a")
    assert bad.reason == "the field 'a' occurs more than once: which one is the list is a guess"
    (tmp_path / "a.json").write_bytes(b'{"a": [{"text": "x", "text": "z"}, {"text": "y"}, {"b": 1}]}')
    twice, good, _ = read(tmp_path / "a.json", records="a")
    assert "'text' occurs more than once" in twice.reason and good.text == "y"
    (tmp_path / "a.json").write_bytes(b'[{"text": "x"}]')
    assert (
        read(tmp_path / "a.json", records="a")[0].reason == "no object around 'a': the file itself is a list"
    )
    (tmp_path / "a.json").write_bytes(b'{"a": [{"text": "x"}]}\n' * 2)
    (bad,) = read(tmp_path / "a.json", records="a")
    assert bad.reason == "no object around 'a': the file is not one JSON object"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}')
    for key in ("records", "delimiter", "quote"):
        source = Source(path=str(tmp_path / "a.jsonl"), **{key: "|"})
        with pytest.raises(CorpusError, match=f"the source's {key} has no effect"):
            open_source(source, Corpus(sources={"s": {"path": "x"}}))


def test_a_large_object_over_several_lines_is_not_cut(tmp_path):
    (tmp_path / "a.json").write_bytes(pretty({"data": [{"text": f"{n}"} for n in range(500)]}))
    (file,) = list_files(Source(path=str(tmp_path / "a.json")))
    assert cut_file(file, 1024, ReadOptions("auto", "text", "line")) == []


# --- CSV


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_csv_is_the_one_by_which_the_header_has_the_text(tmp_path, name, delimiter):
    rows = [f'{n}{delimiter}"a, b; c\t| d\n{n}"' for n in range(200)]
    (tmp_path / name).write_text("\n".join([f"id{delimiter}text", *rows]))
    expected = [f"a, b; c\t| d\n{n}" for n in range(200)]
    assert texts(read(tmp_path / name)) == expected
    (file,) = list_files(Source(path=str(tmp_path / name)))
    cuts = cut_file(file, 1024, ReadOptions("auto", "text", "line"))
    parts = (read(tmp_path / name, part=Part(0, cut.start, cut.end)) for cut in cuts)
    assert len(cuts) > 2 and [item.text for part in parts for item in part] == expected


def test_a_delimiter_and_a_quote_may_be_set(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id:text\n1:say "hi", then\n2:"\n')
    assert texts(read(path, delimiter=":", quote="none")) == ['say "hi", then', '"']
    path.write_text("id,text\n1,'a, b'\n2,'it''s'\n")
    assert texts(read(path, quote="'")) == ["a, b", "it's"]
    path.write_text("id,text\n" + "1,'a\nb'\n" * 400)
    (file,) = list_files(Source(path=str(path)))
    cuts = cut_file(file, 1024, ReadOptions("auto", "text", "line", quote="'"))
    parts = (read(path, part=Part(0, cut.start, cut.end), quote="'") for cut in cuts)
    assert len(cuts) > 2 and [item.text for part in parts for item in part] == ["a\nb"] * 400
    path.write_text("id:text\n1:a\n")
    (bad,) = read(path)
    assert bad.reason == "no column 'text' (columns: id:text)"
    with pytest.raises(CorpusError) as caught:
        open_source(Source(path=str(path)), Corpus(sources={"s": {"path": "x"}}))
    assert "or its delimiter" in caught.value.fix


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
def test_an_empty_file_has_no_documents(tmp_path, name):
    for content in (b"", b"\n\r\n"):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == []
    for compression in COMPRESSIONS:
        (tmp_path / f"{name}.{compression}").write_bytes(b"")
        assert read(tmp_path / f"{name}.{compression}") == []


def test_the_column_is_looked_for_in_the_first_file_that_is_not_empty(tmp_path):
    (tmp_path / "part-0.csv").write_text("")
    (tmp_path / "part-1.csv").write_text("id,body\n1,a\n")
    with pytest.raises(CorpusError, match=r"part-1\.csv has no column 'text'"):
        open_source(Source(path=str(tmp_path)), Corpus(sources={"s": {"path": "x"}}))


def test_csv_keeps_quoted_newlines_and_every_character(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbf"text",n\r\n"a\r\nb ""q"" \xe2\x80\xa8",1\r\n\r\n 007 ,2\r\n,3'
    )
    assert texts(read(tmp_path / "a.csv")) == ['a\r\nb "q" \u2028', " 007 ", ""]
    (tmp_path / "a.tsv").write_bytes(b"n\ttext\n1\ta, b\n")
    assert texts(read(tmp_path / "a.tsv")) == ["a, b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,a\xffb", "invalid UTF-8"),
        (b"\xff,a", "invalid UTF-8"),
        (b"1,a,b", "invalid CSV: 3 fields where the header has 2"),
        (b"1", "invalid CSV: 1 fields where the header has 2"),
        (b'1,"a"b', "invalid CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_row_of_csv_is_one_bad_record(tmp_path, line, reason):
    (tmp_path / "a.csv").write_bytes(b"n,text\n0,before\n" + line + b"\n2,after\n")
    before, bad, after = read(tmp_path / "a.csv")
    assert (before, after.text) == (Record("before", 7), "after")
    assert bad == Bad(16, reason, "byte")


def test_a_quote_that_never_closes_is_bad_not_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'n,text\n0,good\n1,"open\n2,lost\n')
    good, bad = read(tmp_path / "a.csv")
    assert good.text == "good"
    assert bad.row == 14
    assert "unexpected end of data" in bad.reason


# --- columns


def table_file(folder, array, kind="parquet", name="text"):
    path = folder / f"a.{kind}"
    table = pa.table({"other": list(range(len(array))), name: array})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_string_type_is_text_and_null_is_bad(tmp_path, kind, type_):
    path = table_file(tmp_path, pa.array(["é", None, "c"] * 3).cast(type_), kind)
    assert read(path)[:3] == [Record("é", 0), Bad(1, "text is null"), Record("c", 2)]
    assert len(read(path)) == 9


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("array", "what"),
    [
        (pa.array([b"a"]), "binary"),
        (pa.array([1]), "int64"),
        (pa.array([["a"]]), "list<"),
        (pa.nulls(1), "null"),
    ],
)
def test_other_types_are_bad(tmp_path, kind, array, what):
    (bad,) = read(table_file(tmp_path, array, kind))
    assert bad.row is None
    assert f"text is {what}" in bad.reason
    assert "not a string" in bad.reason


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_struct_fields_by_dotted_path(tmp_path, kind):
    array = pa.array([{"b": {"c": "x"}}, None, {"b": None}], pa.struct({"b": pa.struct({"c": pa.string()})}))
    path = table_file(tmp_path, array, kind, "a")
    assert read(path, "a.b.c") == [Record("x", 0), Bad(1, "a.b.c is null"), Bad(2, "a.b.c is null")]
    both = pa.table({"a": array, "a.b.c": ["p", "q", "r"]})
    pq.write_table(both, tmp_path / "both.parquet")
    assert texts(read(tmp_path / "both.parquet", "a.b.c")) == ["p", "q", "r"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_invalid_utf8_in_a_column_spoils_its_own_row_only(tmp_path, kind):
    offsets = pa.py_buffer(struct.pack("<4i", 0, 2, 4, 6))
    array = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"okx\xffok")])
    path = table_file(tmp_path, array, kind)
    assert read(path) == [Record("ok", 0), Bad(1, "invalid UTF-8 at byte 1 of the record"), Record("ok", 2)]


def test_a_torn_parquet_file_is_one_bad_file(tmp_path):
    path = write(tmp_path, "a.parquet", [{"id": i, "text": "x"} for i in range(9)])
    path.write_bytes(path.read_bytes()[:-20])
    (bad,) = read(path)
    assert bad.row is None
    assert "not a readable parquet file" in bad.reason


def test_a_damaged_row_group_does_not_take_the_others_along(tmp_path):
    path = tmp_path / "a.parquet"
    long = ["".join(f"{(i + 7) ** j:x} " for j in range(60)) for i in range(12)]
    pq.write_table(
        pa.table({"text": long}), path, row_group_size=4, use_dictionary=False, write_page_checksum=True
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    end = column.data_page_offset + column.total_compressed_size
    raw = bytearray(path.read_bytes())
    raw[end - 60 : end - 30] = b"0" * 30
    path.write_bytes(raw)
    items = read(path)
    assert [item.row for item in items] == [0, 1, 2, 3, None, 8, 9, 10, 11]
    assert items[4].reason.startswith("row group 1 is damaged")


def test_a_torn_arrow_stream_keeps_what_came_before(tmp_path):
    table = pa.table({"text": ["a", "b", "c", "d"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    raw = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(raw[:-30])
    items = read(tmp_path / "a.arrow")
    assert [item.text for item in items[:2]] == ["a", "b"]
    assert bads(items)[0].row is None
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 nonsense")
    assert "not a readable Arrow file" in read(tmp_path / "b.arrow")[0].reason


def test_a_row_group_that_gives_fewer_rows_than_it_says_is_bad(tmp_path):
    path = tmp_path / "a.parquet"
    groups = [[f"{group} {i}" for i in range(50)] for group in range(3)]
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as sink:
        for group in groups:
            sink.write_table(pa.table({"text": group}))
    raw = bytearray(path.read_bytes())
    numbers = [match.end() - 1 for match in re.finditer(rb"\x04text\x15.\x16\x64", raw, re.DOTALL)]
    raw[numbers[1]] ^= 1  # the second row group's number of values becomes negative
    path.write_bytes(raw)
    items = read(path)
    assert texts(items[:50]) == groups[0]
    assert [bad.reason for bad in bads(items)] == ["row group 1 holds 0 rows of text, and says 50"]
    assert [item.text for item in items[51:]] == groups[2]


@pytest.mark.parametrize("codec", [None, "lz4"])
def test_an_arrow_stream_without_its_end_mark_is_bad_after_its_rows(tmp_path, codec):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": [str(i) for i in range(40)]})
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(path, table.schema, options=options) as sink:
        sink.write_table(table, max_chunksize=10)
    whole = path.read_bytes()
    batches = [at for at in range(0, len(whole), 8) if whole.startswith(b"\xff" * 4, at)]
    path.write_bytes(whole[: batches[3]])
    items = read(path)
    assert [item.text for item in items[:-1]] == [str(i) for i in range(20)]
    assert "without its end mark" in items[-1].reason
    path.write_bytes(whole + bytes(16))
    assert len(texts(read(path))) == 40
    path.write_bytes(whole + whole)
    assert "more follows" in bads(read(path))[0].reason


def test_arrow_offsets_that_lie_are_bad(tmp_path):
    path = table_file(tmp_path, pa.array(["first words", "second words"]), "arrow")
    honest = struct.pack("<3i", 0, 11, 23)
    raw = path.read_bytes()
    assert raw.count(honest) == 1
    path.write_bytes(raw.replace(honest, struct.pack("<3i", 0, 2**30, 23)))
    (bad,) = read(path)
    assert "damaged" in bad.reason


# --- bytes that are no UTF-8 text, and what is too long


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "a.txt.gz"])
def test_utf16_is_recognised_and_is_one_bad_file(tmp_path, name, encoding):
    raw = {"a.jsonl": '{"text": "one"}\n{"text": "two"}\n', "a.csv": "text\none\ntwo\n"}.get(
        name, "[1]\ntwo\n"
    )
    raw = raw.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    (bad,) = read(path)
    named = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}.get(encoding, encoding.upper())
    assert bad.row is None
    assert f"it is {named} text" in bad.reason
    assert f"iconv -f {named} -t UTF-8 '{name}'" in bad.reason
    (file,) = list_files(Source(path=str(path)))
    assert cut_file(file, 4, ReadOptions("auto", "text", "line")) == []


def read_encoded(path, encoding, document="line"):
    (file,) = list_files(Source(path=str(path)))
    options = ReadOptions("auto", "text", document, encoding)
    assert cut_file(file, 100, options) == []
    return [item for chunk in read_part(file, Part(0), options) for item in chunk]


@pytest.mark.parametrize("encoding", get_args(Encoding))
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.json"])
def test_other_encodings_are_converted(tmp_path, name, encoding, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK_BYTES", 101)  # characters lie across blocks
    tail = {"latin-1": "é", "cp1252": "€", "cp1251": "д", "koi8-r": "д", "big5": "中", "euc-kr": "한"}
    records = [{"id": i, "text": f"text {i} " + tail.get(encoding, "日本") * i} for i in range(20)]
    path = write(tmp_path, name, records)
    raw = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    raw = raw.decode().encode(encoding)
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    if encoding == "utf-8":
        assert texts(read(path)) == [record["text"] for record in records]
    else:
        assert texts(read_encoded(path, encoding)) == [record["text"] for record in records]


def test_text_that_is_not_in_the_encoding_is_bad_after_what_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo\n".encode("utf-16-le") + b"\0\xd8x\0" + "three".encode("utf-16-le"))
    *good, bad = read_encoded(path, "utf-16-le")
    assert texts(good) == ["one", "two"]
    assert bad.reason.startswith("invalid utf-16-le: ")
    (bad,) = read_encoded(path, "utf-16")
    assert bad.reason == "no byte order mark of utf-16: set the encoding to utf-16-le or utf-16-be"
    path.write_bytes("one\nt".encode("shift_jis") + b"\x81")  # ends within a character
    assert "invalid shift_jis" in read_encoded(path, "shift_jis")[-1].reason


def test_parquet_has_no_other_encoding_and_the_encoding_counts(tmp_path):
    path = write(tmp_path, "a.parquet", [{"id": i, "text": str(i)} for i in range(9)])
    corpus = Corpus(sources={"s": {"path": "x"}}, slice_bytes=1024)
    sources = [open_source(Source(path=str(path), encoding=e), corpus) for e in ["utf-8", "utf-16"]]
    plain, other = (list(source.texts(source.plan())) for source in sources)
    assert plain == other
    assert "encoding" not in sources[0].identity()["options"]
    assert sources[1].identity()["options"]["encoding"] == "utf-16"


def test_text_with_nul_bytes_is_bad_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\0two\n\nthree\n\nfour")
    nul = Bad(0, "NUL bytes: it is no UTF-8 text", "byte")
    for document in ["line", "paragraph"]:
        assert read(path, document=document) == [nul, ByteRecord("three", 9), ByteRecord("four", 16)]
    assert read(path, document="file") == [nul]
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,one\n2,t\0o\n3,three\n")
    assert read(path) == [ByteRecord("one", 8), nul._replace(row=14), ByteRecord("three", 20)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "n\\u0000l"}\n')
    assert texts(read(path)) == ["n\0l"]


@pytest.fixture
def small_limits(monkeypatch):
    """Records of more than 40 KiB are too long; blocks have 4 KiB."""
    for module in [streams, json_format, text_format, csv_format]:
        if hasattr(module, "MAX_RECORD_BYTES"):
            monkeypatch.setattr(module, "MAX_RECORD_BYTES", 40_960)
        if hasattr(module, "CHUNK_BYTES"):
            monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    for function in [streams.whole_lines, streams.lines_but_long_ones]:
        monkeypatch.setattr(function, "__defaults__", (40_960,))


LONG = "long " * 20_000


@pytest.mark.parametrize("tail", ["", "\n", "\nthree\n", "\n" + "four " * 2000 + "\n\nfive"])
def test_a_line_that_is_too_long_is_one_bad_record(tmp_path, small_limits, tail):
    path = tmp_path / "a.txt"
    path.write_text(f"one\ntwo\n{LONG}{tail}")
    bad = Bad(8, "a line of more than 128 MiB", "byte")
    after = [ByteRecord(line, 8 + len(LONG) + tail.index(line)) for line in tail.split("\n") if line]
    assert read(path) == [ByteRecord("one", 0), ByteRecord("two", 4), bad, *after]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + LONG + '"}' + ('\n{"text": "two"}' if tail else ""))
    assert read(path)[1] == bad._replace(row=16)
    assert [item.text for item in read(path)[2:]] == ["two"] * bool(tail)


@pytest.mark.parametrize(
    ("name", "document", "content", "reason"),
    [
        ("a.txt", "file", LONG, "a document of more than"),
        ("a.txt", "paragraph", "one\n\n" + LONG.replace(" ", "\n"), "a paragraph of more than"),
        ("a.txt", "paragraph", "one\n\n" + LONG, "a line of more than"),
        ("a.csv", "line", "text\none\n" + LONG + "\ntwo\n", "a line of more than"),
        ("a.csv", "line", 'text\none\n"' + LONG.replace(" ", "\n") + '"\ntwo\n', "a field of more than"),
        (
            "a.json",
            "line",
            json.dumps([{"text": "one"}, {"text": LONG}, {"text": "b"}]),
            "an element of more",
        ),
        ("a.json", "file", " " * 100_000 + "[]", "white space of more than"),
        ("a.json", "file", LONG, "a line of more than"),
    ],
)
def test_other_records_that_are_too_long_are_bad(tmp_path, small_limits, name, document, content, reason):
    path = tmp_path / name
    path.write_text(content)
    *good, bad = read(path, document=document)
    assert texts(good) == ([] if document == "file" else ["one"])
    assert reason in bad.reason


# --- compression


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.lz4", "a.csv.gz", "a.json.gz"]
)
def test_a_truncated_file_keeps_the_records_before_the_tear(tmp_path, name):
    records = [{"id": i, "text": "".join(f"{(i * j) ** 3:x} " for j in range(60))} for i in range(9000)]
    path = write(tmp_path, name, records)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 3 // 4])
    items = read(path)
    good = [item.text for item in items if isinstance(item, Record)]
    assert len(good) > 500
    assert good == [record["text"] for record in records[: len(good)]]
    assert bads(items)[-1].row is None
    assert "truncated" in bads(items)[-1].reason.lower()


def test_zstd_with_a_window_of_two_gigabytes_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, hash_log=6, chain_log=6, strategy=1)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = packed.compress(b'{"text": "a"}\n') + packed.flush()
    assert zstandard.get_frame_parameters(content).window_size == 2**31
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["a"]


def test_a_damaged_gzip_is_bad(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip at all")
    (bad,) = read(tmp_path / "a.jsonl.gz")
    assert "damaged .gz" in bad.reason


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz"])
@pytest.mark.parametrize("at", [-5, -1])
def test_a_wrong_checksum_of_gzip_is_bad_after_the_text_before_it(tmp_path, name, at):
    """at: the checksum's last byte, the length's last byte."""
    records = [{"id": i, "text": f"text {i}"} for i in range(100)]
    if name == "a.txt.gz":
        path = tmp_path / name
        path.write_bytes(gzip.compress("".join(f"{record['text']}\n" for record in records).encode()))
    else:
        path = write(tmp_path, name, records)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    *good, bad = read(path)
    assert texts(good) == [record["text"] for record in records]
    assert "checksum is not that of the content" in bad.reason


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_compressed_csv_keeps_its_rows_before_damage(tmp_path, pack):
    path = tmp_path / f"a.csv.{'gz' if pack is gzip.compress else 'xz'}"
    path.write_bytes(pack(b"text\none\ntwo\n") + b"not compressed")
    *good, bad = read(path)
    assert texts(good) == ["one", "two"]
    assert "damaged" in bad.reason


def pack_lz4(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def test_csv_in_lz4_is_read_after_its_header(tmp_path):
    (tmp_path / "a.csv.lz4").write_bytes(pack_lz4(b"id,text\n1,a\n"))
    assert texts(read(tmp_path / "a.csv.lz4")) == ["a"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        *[("gz", gzip.compress), ("bz2", bz2.compress), ("zst", zstandard.compress)],
        *[("xz", lzma.compress), ("lz4", pack_lz4)],
    ],
)
def test_members_of_one_file_are_joined(tmp_path, name, pack):
    path = tmp_path / f"a.txt.{name}"
    path.write_bytes(pack(b"one\ntw") + pack(b"o\nthree\n") + (b"\0" * 9 if name == "gz" else b""))
    assert texts(read(path)) == ["one", "two", "three"]


# --- columns that are not there, and storage


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_an_error_that_lists_those_there_are(tmp_path, name):
    (file,) = list_files(
        Source(path=str(write(tmp_path, name, [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}])))
    )
    check_column(file, ReadOptions("auto", "text", "line"))
    with pytest.raises(CorpusError, match="'body'") as caught:
        check_column(file, ReadOptions("auto", "body", "line"))
    assert "id, text" in str(caught.value)
    assert file.name in str(caught.value)
    assert all(isinstance(item, Bad) for item in read(file.location, "body"))


def same_names(folder, kind):
    """A file with two columns named text."""
    path = folder / f"a.{kind}"
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if kind == "csv":
        path.write_text("text,text\na,b\n")
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_two_columns_of_the_name_are_refused_not_guessed(tmp_path, kind):
    path = same_names(tmp_path, kind)
    assert [bad.reason for bad in read(path)] == ["2 columns named 'text' (columns: text, text)"]
    corpus = Corpus(sources={"s": {"path": str(path)}})
    with pytest.raises(CorpusError, match=rf"a.{kind} has 2 columns named 'text'") as caught:
        open_source(Source(path=str(path)), corpus)
    assert "rename" in caught.value.fix


def test_two_struct_fields_of_the_name_are_refused(tmp_path):
    fields = [pa.field("a", pa.string()), pa.field("a", pa.string())]
    path = table_file(tmp_path, pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], fields=fields))
    assert [bad.reason for bad in read(path, "text.a")] == ["2 columns named 'a' (columns: a, a)"]


TWICE = "the field 'text' occurs more than once: which one holds the text is a guess"


@pytest.mark.parametrize(
    "twice",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "te\\u0078t": "b"}',
        '{"text" : 1, "b": {"text": 2}, "text": "b"}',
        '{"text": "a", "big": 999999999999999999999999, "text": "b"}',
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json"])
def test_a_key_that_occurs_twice_is_bad_not_guessed(tmp_path, name, twice):
    good = ['{"text": "\\"text\\": x"}', '{"text": "c", "b": {"text": "inner"}}', '{"text": "\\u00e9"}']
    records = [*good, twice, *good]
    path = tmp_path / name
    path.write_text("[" + ",".join(records) + "]" if name == "array.json" else "\n".join(records))
    items = read(path)
    assert [item.reason if isinstance(item, Bad) else item.text for item in items] == [
        *['"text": x', "c", "é"],
        TWICE,
        *['"text": x', "c", "é"],
    ]


def test_a_deep_record_is_looked_at_for_keys_that_occur_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = '[{"text": ' * 500 + "1" + "}]" * 500
    path.write_text(f'{{"text": "a", "x": {deep}}}\n{{"text": "a", "x": {deep}, "text": "b"}}')
    good, bad = read(path)
    assert good.text == "a"
    assert bad.reason == TWICE


def test_keys_of_a_dotted_column_may_not_repeat_either(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        '{"a": {"b": "one"}, "b": 1}',
        '{"a": {"b": "one", "b": "two"}}',
        '{"a": {"b": "one"}, "a": {"b": "two"}}',
        '{"a.b": "one", "a": 1, "a": 2}',
        '{"a.b": "one", "a.b": "two"}',
    ]
    path.write_text("\n".join(records))
    assert [item.text if isinstance(item, Record) else None for item in read(path, "a.b")] == [
        *["one", None, None, "one", None]
    ]
    path.write_text(
        '{"größe": "a"}\n{"gr\\u00f6ße": "a"}\n{"größe": "a", "gr\\u00F6\\u00dfe": "b", "x": "größe"}'
    )
    assert [isinstance(item, Record) for item in read(path, "größe")] == [True, True, False]


def test_a_json_file_with_a_column_twice_is_bad(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": ["a"], "text": ["b"]}')
    assert [bad.reason for bad in read(path)] == [TWICE]


def test_a_column_that_only_some_records_have_is_no_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"text": "x"}\n')
    (file,) = list_files(Source(path=str(tmp_path / "a.jsonl")))
    check_column(file, ReadOptions("auto", "text", "line"))


def test_remote_files_are_read_like_local_ones(tmp_path):
    remote = fsspec.filesystem("memory")
    for name in NAMES:
        path = write(tmp_path, name, [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
        remote.pipe(f"/formats/{name}", path.read_bytes())
        assert texts(read(f"memory://formats/{name}")) == TEXTS


def test_a_file_that_is_gone_or_shrank_is_an_error_not_a_bad_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 9)
    (file,) = list_files(Source(path=str(path)))
    path.write_bytes(b'{"text": "a"}\n')
    for part in [Part(0, 14, 126), Part(0, 0, -1)]:
        with pytest.raises(CorpusError, match="shorter"):
            list(read_part(file, part, ReadOptions("auto", "text", "line")))
    path.unlink()
    with pytest.raises(CorpusError, match="cannot read"):
        list(read_part(file, Part(0, 0, -1), ReadOptions("auto", "text", "line")))


# --- the table of formats


def test_the_schema_lists_the_formats_of_the_table():
    """The job is checked, with line numbers, by a package that cannot import the readers."""
    assert set(get_args(Format)) == {"auto", *READERS}


def test_an_extension_belongs_to_one_format():
    extensions = [extension for reader in READERS.values() for extension in reader.extensions]
    assert len(extensions) == len(set(extensions))


def test_a_format_needs_one_line_of_the_table(tmp_path, monkeypatch):
    """Then its files are found, split and read, compressed or not."""

    def read_records(stream, part, options):
        for offset, lines in whole_lines(blocks(stream, part)):
            yield [
                Record(line, offset) if line != "!" else Bad(offset, "!") for line in lines.decode().split()
            ]

    shout = Reader("shout", ("up",), read_records, lambda stream, n_bytes, _: cut_lines(stream, n_bytes))
    monkeypatch.setitem(READERS, "shout", shout)
    (tmp_path / "a.up").write_text("ONE\nTWO\n!\n" * 100)
    (tmp_path / "b.up.gz").write_bytes(gzip.compress(b"THREE\n"))
    source = open_source(
        Source(path=str(tmp_path)), Corpus(sources={"a": {"path": str(tmp_path)}}, slice_bytes=2**20)
    )
    assert [(file.format, file.compression) for file in source.files] == [("shout", None), ("shout", "gz")]
    slices = plan_slices(source.files, source.options, 100)
    assert len(slices) > 8
    assert sorted(source.texts(slices)) == ["ONE"] * 100 + ["THREE"] + ["TWO"] * 100
