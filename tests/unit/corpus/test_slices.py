"""However files are cut, reading the slices gives what reading the whole files gives."""

import csv
import gzip
import io
import tempfile
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.corpus import slices as slices_module
from raydist.corpus.files import list_files
from raydist.corpus.formats import Bad, ByteRecord, Part, ReadOptions, Record, read_part
from raydist.corpus.slices import from_json, plan_slices, read_slice, to_json
from raydist.job.schema import Source

WORDS = st.text(st.sampled_from("ab ,\"'\n\r\t\u2028\x0cé日🎉"), max_size=30)
SLICE_BYTES = st.integers(1, 200)


def options(document="line"):
    return ReadOptions("auto", "text", document)


def list_all(folder):
    return list_files(Source(path=str(folder)))


def whole(files, how):
    return [
        (i, item)
        for i, f in enumerate(files)
        for items in read_part(f, Part(i, 0, -1), how)
        for item in items
    ]


def in_slices(files, slices, how):
    """Every item, and the parts put back in the order of the files."""
    pairs = [pair for entry in slices for chunk in read_slice(files, entry, how) for pair in chunk]
    return sorted(pairs, key=lambda pair: (pair[0], pair[1].row))


def assert_cuts_change_nothing(name, raw, slice_bytes, document="line"):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(raw)
        files, how = list_all(folder), options(document)
        slices = plan_slices(files, how, slice_bytes)
        assert in_slices(files, slices, how) == whole(files, how)
        return slices


@settings(deadline=None, max_examples=80)
@given(st.lists(WORDS, max_size=12), SLICE_BYTES, st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.booleans())
def test_json_lines_at_any_cut(texts, slice_bytes, newline, ends):
    raw = newline.join(orjson.dumps({"text": text}) for text in texts) + (newline if ends else b"")
    assert_cuts_change_nothing("a.jsonl", raw, slice_bytes)


@settings(deadline=None, max_examples=120)
@given(
    WORDS.map(str.encode) | st.binary(max_size=100),
    SLICE_BYTES,
    st.sampled_from(["line", "paragraph", "file"]),
)
def test_text_at_any_cut(raw, slice_bytes, document):
    assert_cuts_change_nothing("a.txt", raw * 3, slice_bytes, document)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(WORDS, WORDS), max_size=12),
    SLICE_BYTES,
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_at_any_cut(rows, slice_bytes, quoting):
    sink = io.StringIO(newline="")
    csv.writer(sink, quoting=quoting).writerows([("text", "b"), *rows])
    raw = sink.getvalue().encode()
    assert_cuts_change_nothing("a.csv", raw, slice_bytes)
    assert_cuts_change_nothing("a.csv", b"\xef\xbb\xbf" + raw, slice_bytes)


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from('"",\n\rab '), max_size=60), SLICE_BYTES)
def test_csv_of_any_nonsense_at_any_cut(text, slice_bytes):
    assert_cuts_change_nothing("a.csv", b"text,b\n" + text.encode(), slice_bytes)


def test_csv_is_cut_although_records_hold_newlines():
    rows = [f'{i},"line ""{i}""\n\nsecond, line"' for i in range(200)]
    raw = "\n".join(["id,text", *rows]).encode()
    slices = assert_cuts_change_nothing("a.csv", raw, 1000)
    assert 6 <= len(slices) <= len(raw) // 1000 + 1
    for entry in slices:
        start = entry.parts[0].start
        assert start == 0 or raw[start : start + 4].split(b",")[0].isdigit()


def test_csv_is_not_cut_past_a_quote_whose_meaning_is_unproven():
    good = "".join(f'{i},"a\nb"\n' for i in range(100))
    raw = ("id,text\n" + good + '7,5" pipe\n' + good).encode()
    slices = assert_cuts_change_nothing("a.csv", raw, 200)
    assert len(slices) > 2
    assert max(entry.parts[0].start for entry in slices) < raw.index(b'5" pipe')


def test_a_large_csv_is_scanned_across_blocks():
    """Quotes, escaped ones and line ends fall on the edges of the blocks that are scanned."""
    row = '"' + 'x""\n' * 500 + '",1\n'
    raw = ("text,n\n" + row * 5000).encode()
    assert len(raw) > 2 * 4 * 2**20
    slices = assert_cuts_change_nothing("a.csv", raw, 1_100_003)
    assert len(slices) == -(-len(raw) // 1_100_003)


@pytest.mark.parametrize(
    ("name", "document"), [("a.jsonl", "line"), ("a.txt", "line"), ("a.txt", "paragraph")]
)
def test_ranges_are_even_and_cover_the_file(tmp_path, name, document):
    line = b'{"text": "some words in a line"}\n' + (b"\n" if document == "paragraph" else b"")
    (tmp_path / name).write_bytes(line * 10_000)
    files = list_all(tmp_path)
    parts = sorted(
        (entry.parts[0] for entry in plan_slices(files, options(document), 50_000)), key=lambda p: p.start
    )
    assert [p.start for p in parts] == [0, *(p.end for p in parts[:-1])]
    assert parts[-1].end == files[0].size
    assert all(40_000 < p.end - p.start <= 51_000 for p in parts)


def test_row_groups_and_batches_are_shared_out(tmp_path):
    table = pa.table({"text": [f"{i} " * 50 for i in range(1000)]})
    pq.write_table(
        table, tmp_path / "a.parquet", row_group_size=100, compression="none", use_dictionary=False
    )
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=100)
    files, how = list_all(tmp_path), options()
    slices = plan_slices(files, how, files[0].size // 4)
    assert [sum(entry.parts[0].file == i for entry in slices) for i in (0, 1)] == [5, 5]
    assert in_slices(files, slices, how) == whole(files, how)
    assert [item.text for _, item in whole(files, how)] == table["text"].to_pylist() * 2


LINES = {
    "a.jsonl": (b'{"text": "good"}\n', b'{"text": 5}\n'),
    "a.json": (b'{"text": "good"}\n', b"not json\n"),
    "a.txt": (b"good\n", b"b\xffd\n"),
    "a.csv": (b'"good ""one"",\nand more",1\n', b"bad\n"),
}


@pytest.mark.parametrize("n_before", [3, 1000], ids=["small", "cut"])
@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_by_its_byte_in_the_file(tmp_path, name, n_before):
    """Whichever slice it is in: never by a number that counts from the slice's start."""
    good, bad = LINES[name]
    raw = (b"text,n\n" if name == "a.csv" else b"") + good * n_before + bad + good
    (tmp_path / name).write_bytes(raw)
    files, how = list_all(tmp_path), options()
    slices = plan_slices(files, how, 1024)
    assert (len(slices) > 3) == (n_before > 3)
    (found,) = [item for _, item in in_slices(files, slices, how) if isinstance(item, Bad)]
    assert found.unit == "byte" and raw[found.row :].startswith(bad)
    records = [item for _, item in in_slices(files, slices, how) if isinstance(item, Record)]
    assert {item.unit for item in records} == {"byte"}
    assert all(raw[item.row :].startswith(good) for item in records)


@pytest.mark.parametrize("n_before", [3, 1000], ids=["small", "cut"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json"])
def test_a_bad_row_is_named_by_its_number_in_the_file(tmp_path, name, n_before):
    values = [*["good " * 20] * n_before, None, "good"]
    table = pa.table({"text": pa.array(values, pa.string())})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=100, compression="none", use_dictionary=False)
    elif name == "a.arrow":
        with pa.ipc.new_file(tmp_path / name, table.schema) as sink:
            sink.write_table(table, max_chunksize=100)
    else:
        (tmp_path / name).write_bytes(orjson.dumps(table.to_pylist()))
    files, how = list_all(tmp_path), options()
    slices = plan_slices(files, how, files[0].size // 4 + 1)
    assert (len(slices) > 3) == (n_before > 3 and name != "a.json")  # an array is read as a whole
    items = [item for _, item in in_slices(files, slices, how)]
    assert [item for item in items if isinstance(item, Bad)] == [Bad(n_before, "text is null", "row")]
    assert [item.row for item in items] == list(range(n_before + 2))


def test_an_arrow_stream_is_planned_whole(tmp_path):
    table = pa.table({"text": [f"{i} " * 50 for i in range(100)]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=10)
    files, how = list_all(tmp_path), options()
    slices = plan_slices(files, how, files[0].size // 4)
    assert [entry.parts for entry in slices] == [(Part(0),)]
    assert in_slices(files, slices, how) == whole(files, how)


def test_what_cannot_be_cut_stays_whole_and_small_files_share(tmp_path):
    raw = b"".join(orjson.dumps({"text": "word " * 20}) + b"\n" for _ in range(100))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw, 0))
    (tmp_path / "a.json").write_bytes(orjson.dumps([{"text": "word " * 20}] * 100))
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    files, how = list_all(tmp_path), options()
    slices = plan_slices(files, how, 1000)
    sizes = sorted(len(entry.parts) for entry in slices)
    assert sizes[:2] == [1, 1]
    assert sum(sizes) == 302
    assert 4 <= len(slices) <= 8
    assert in_slices(files, slices, how) == whole(files, how)


def test_a_slice_holds_so_many_files_at_most(tmp_path, monkeypatch):
    """One task reads a slice, and each file takes its time."""
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    files, how = list_all(tmp_path), options()
    (common,) = plan_slices(files, how, 2**20)
    monkeypatch.setattr(slices_module, "MAX_PARTS", 4)
    slices = plan_slices(files, how, 2**20)
    assert sorted(len(entry.parts) for entry in slices) == [2, 4, 4]
    assert sum(entry.n_bytes for entry in slices) == common.n_bytes == 70
    assert in_slices(files, slices, how) == whole(files, how)


def test_small_parts_are_read_in_common_lists(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    files = list_all(tmp_path)
    (entry,) = plan_slices(files, options(), 10_000)
    assert len(list(read_slice(files, entry, options()))) == 1


def test_order_is_mixed_and_depends_on_names_only(tmp_path):
    plans = []
    for folder in ["here", "there"]:
        (tmp_path / folder).mkdir()
        for i in range(20):
            (tmp_path / folder / f"{i:02}.txt").write_text(f"line {i}\n" * 100)
        plans.append(plan_slices(list_all(tmp_path / folder), options(), 300))
    assert plans[0] == plans[1]
    order = [entry.parts[0].file for entry in plans[0]]
    assert order != sorted(order)
    assert from_json(orjson.loads(orjson.dumps(to_json(plans[0])))) == plans[0]


def test_a_torn_file_is_planned_whole_and_read_as_bad(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"x" * 5000)
    (tmp_path / "b.txt").write_text("fine")
    files, how = list_all(tmp_path), options()
    items = [
        pair
        for entry in plan_slices(files, how, 1024)
        for chunk in read_slice(files, entry, how)
        for pair in chunk
    ]
    assert {(file, type(item)) for file, item in items} == {(0, Bad), (1, ByteRecord)}


def test_an_edge_of_a_mark_or_blank_lines_alone(tmp_path):
    for slice_bytes in range(1, 12):
        assert_cuts_change_nothing("a.txt", b"\xef\xbb\xbf\n\n \n", slice_bytes, "paragraph")
        assert_cuts_change_nothing("a.jsonl", b"\n\n\n", slice_bytes)
        assert_cuts_change_nothing("a.csv", b"\xef\xbb\xbftext\n\n\na\n", slice_bytes)
