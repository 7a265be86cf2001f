"""Paths, folders, globs and URIs become one sorted list of files with identities."""

import bz2
import gzip
import io
import lzma
import os
import sysconfig
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raydist.corpus.files import list_files, look_up
from raydist.corpus.formats import Bad, detect_format
from raydist.corpus.locations import open_file
from raydist.corpus.slices import read_slice
from raydist.corpus.source import open_source
from raydist.errors import CorpusError
from raydist.fingerprint import fingerprint
from raydist.job.schema import Corpus, Source


def names(path, **options):
    return [
        file.name
        for file in list_files(Source(path=path if isinstance(path, list) else str(path), **options))
    ]


@pytest.fixture
def tree(tmp_path):
    """A folder with known, unknown and hidden files."""
    for name in [
        "a.txt",
        "b/c.jsonl",
        "b/d/e.jsonl.gz",
        "b/notes.doc",
        "_SUCCESS",
        ".x.txt",
        "_tmp/f.txt",
        ".git/g.txt",
    ]:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


def test_folder_is_read_deep_and_skips_hidden_and_unknown(tree):
    assert names(tree) == ["a.txt", "b/c.jsonl", "b/d/e.jsonl.gz"]


def test_folder_gives_every_file_when_the_format_is_set(tree):
    assert names(tree, format="text") == ["a.txt", "b/c.jsonl", "b/d/e.jsonl.gz", "b/notes.doc"]


def test_glob_names_are_relative_to_its_first_fixed_folder(tree):
    assert names(tree / "**" / "*.jsonl*") == ["b/c.jsonl", "b/d/e.jsonl.gz"]
    assert names(tree / "b" / "*.jsonl") == ["c.jsonl"]


def test_glob_of_folders_reads_them(tree):
    assert names(tree / "[b]") == ["b/c.jsonl", "b/d/e.jsonl.gz"]


def test_exclude_takes_globs_and_folders(tree):
    assert names(tree, exclude=["**/*.gz"]) == ["a.txt", "b/c.jsonl"]
    assert names(tree, exclude=["b/"]) == ["a.txt"]
    with pytest.raises(CorpusError, match="exclude leaves no file"):
        names(tree, exclude=["**"])


def test_a_file_that_two_entries_match_counts_once(tree):
    assert names([str(tree), str(tree / "b" / "*.jsonl"), str(tree / "a.txt")]) == names(tree)


def test_equal_names_of_different_files_are_told_apart(tmp_path):
    for folder in ["x", "y"]:
        (tmp_path / folder / "z").mkdir(parents=True)
        (tmp_path / folder / "z" / "p.txt").write_text(folder)
    assert names([str(tmp_path / "x"), str(tmp_path / "y")]) == ["x/z/p.txt", "y/z/p.txt"]


def test_linked_folders_are_followed_once(tree, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "m.txt").write_text("m")
    (tree / "linked").symlink_to(tmp_path / "more")
    (tree / "b" / "loop").symlink_to(tree)
    assert names(tree) == ["a.txt", "b/c.jsonl", "b/d/e.jsonl.gz", "linked/m.txt"]
    (tree / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(CorpusError, match="links to nothing"):
        names(tree)


def test_home_and_standard_library_are_expanded(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert names("~/data/a.txt") == ["a.txt"]
    assert names("${stdlib}/json/*.py") == sorted(
        p.name for p in Path(sysconfig.get_path("stdlib"), "json").glob("*.py")
    )


@pytest.mark.parametrize("entry", ["missing", "missing.txt", "*.txt", "missing/**"])
def test_what_matches_nothing_is_an_error_with_the_way_out(tmp_path, entry):
    with pytest.raises(CorpusError, match="no file matches") as caught:
        names(tmp_path / entry)
    assert caught.value.where.endswith(entry)
    assert caught.value.fix


def test_unknown_formats_are_errors(tree):
    with pytest.raises(CorpusError, match="format") as caught:
        names(tree / "b" / "notes.doc")
    assert "set the source's format" in caught.value.fix
    (tree / "only").mkdir()
    (tree / "only" / "x.doc").write_text("x")
    with pytest.raises(CorpusError, match=r"no file of .* has a known format") as caught:
        names(tree / "only")
    assert "x.doc" in caught.value.why


def source_of(path, on_error, **options):
    source = Source(path=str(path), **options)
    return open_source(source, Corpus(sources={"s": {"path": "x"}}, on_error=on_error))


@pytest.fixture
def mixed(tmp_path):
    """A folder of data, of what raydist cannot read, and of what comes with data."""
    folder = tmp_path / "mixed"
    for name in [
        *["a.jsonl", "b/README.md"],
        *["b/c.parquet.gz", "d.jsonl.bak", "e.doc", "part-00000"],
        *["_SUCCESS", ".git/x", ".hidden.jsonl", "README", "LICENSE", "SHA256SUMS", "a.jsonl.md5"],
        *["dataset_info.json", "state.json", "b/x.png"],
    ]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')
    os.mkfifo(folder / "pipe.jsonl")
    return folder


UNUSED = {
    "b/c.parquet.gz": "not used: parquet inside .gz has to be decompressed",
    "d.jsonl.bak": "not used: .bak follows .jsonl: rename it",
    "e.doc": "not used: .doc is no format that raydist reads",
    "part-00000": "not used: no extension says which format it has",
}


@pytest.mark.parametrize("pattern", ["", "**"])
def test_files_of_unknown_formats_are_refused_by_name_or_are_bad(mixed, pattern):
    with pytest.raises(CorpusError, match="4 of the source's 6 files cannot be read") as caught:
        source_of(mixed / pattern, "fail")
    assert all(name in caught.value.where for name in UNUSED)
    assert "['**/*.bak', '**/*.doc', '**/*.gz']" in caught.value.fix
    source = source_of(mixed / pattern, "quarantine")
    assert [file.name for file in source.files] == sorted(["a.jsonl", "b/README.md", *UNUSED])
    found = {}
    for slice_ in source.plan():
        for items in read_slice(source.files, slice_, source.options):
            found |= {source.files[file].name: item for file, item in items if isinstance(item, Bad)}
    assert found == {name: Bad(None, reason) for name, reason in UNUSED.items()}
    names = [file.name for file in source_of(mixed / pattern, "fail", exclude=list(UNUSED)).files]
    assert names == ["a.jsonl", "b/README.md"]


def test_what_a_folder_holds_and_is_not_used_is_counted_by_reason(mixed):
    left_out = source_of(mixed, "fail", exclude=["*.doc", "*.bak", "**/*.gz", "part*"]).left_out
    assert {reason: found["count"] for reason, found in left_out.items()} == {
        "companions of data": 6,
        "excluded": 4,
        "images, sound, programs or weights": 1,
        "names that begin with _ or .": 3,
        "no regular files": 1,
    }
    assert left_out["names that begin with _ or ."]["examples"] == [".git/", ".hidden.jsonl", "_SUCCESS"]
    assert source_of(mixed / "*.jsonl", "fail").left_out == {
        "no regular files": {"count": 1, "examples": ["pipe.jsonl"]}
    }
    assert source_of(mixed / "a.jsonl", "fail").left_out == {}


def test_what_is_left_out_does_not_change_the_identity(mixed):
    before = source_of(mixed / "[ab]*", "fail", exclude=["b"])
    (mixed / "a.png").write_text("x")
    after = source_of(mixed / "[ab]*", "fail", exclude=["b"])
    assert after.left_out != before.left_out
    assert after.identity() == before.identity()


def test_the_identity_of_a_source_stays_what_it_was(tmp_path):
    """Token logs that exist are used on: the name of each is made from this."""
    contents = {
        "a.jsonl": '{"text": "one", "meta": {"text": "inner"}}\n{"text": "tw\\u00f6"}\n',
        "b.csv": 'id,text\n1,"three\nfour"\n',
        "c.txt": "five\r\nsix\n",
        "d/e.json": '[{"text": "seven"}]',
        "d/README.md": "eight\n",
        "_SUCCESS": "",
        "d/.hidden": "",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    source = source_of(tmp_path, "fail")
    assert fingerprint(source.identity()) == "54e5f7b9eeb264be43bfac20c9777154"
    assert [[(part.file, part.start, part.end) for part in slice_.parts] for slice_ in source.plan()] == [
        [(1, 0, -1), (0, 0, -1), (4, 0, -1), (2, 0, -1), (3, 0, -1)]
    ]
    assert list(source.texts(source.plan())) == ["three\nfour", "one", "twö", "seven", "five", "six", "eight"]


@pytest.fixture
def unprivileged():
    """A folder that is open to all, and no rights of root in it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name in ["a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl"]:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text('{"text": "a"}\n')
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield Path(folder), user
        os.seteuid(user)
        Path(folder, "sub").chmod(0o755)


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "sub/*.jsonl", "*/*.jsonl", "*/b.jsonl", "*/deep/*", "**"])
@pytest.mark.parametrize("mode", [0, 0o444])
def test_a_glob_refuses_folders_that_it_cannot_read(unprivileged, pattern, mode):
    folder, user = unprivileged
    assert names(folder / pattern)
    os.seteuid(user)
    (folder / "sub").chmod(mode)
    if user == 0:
        os.seteuid(65534)
    with pytest.raises(CorpusError, match=r"cannot read .*sub"):
        names(folder / pattern)
    if pattern == "**/*.jsonl":
        assert names(folder / pattern, exclude=["sub/"]) == ["a.jsonl"]


def test_a_name_with_wildcard_characters_is_itself(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_identity_follows_the_content_not_the_time(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = list_files(Source(path=str(file)))[0]
    os.utime(file, (1, 1))
    assert list_files(Source(path=str(file)))[0] == first
    file.write_text("two")
    assert list_files(Source(path=str(file)))[0].identity != first.identity


def test_identity_of_a_large_file_follows_its_ends_and_time(tmp_path):
    file = tmp_path / "a.txt"
    with file.open("wb") as stream:
        stream.truncate(65 * 2**20)  # sparse
    os.utime(file, (1, 1))
    first = list_files(Source(path=str(file)))[0]
    assert list_files(Source(path=str(file)))[0] == first
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(file, (1, 1))
    assert list_files(Source(path=str(file)))[0].identity != first.identity


def test_remote_filesystems_list_and_open():
    remote = fsspec.filesystem("memory")
    for name in ["a b.txt", "sub/c.txt", "sub/_d.txt", "sub/e.bin"]:
        remote.pipe(f"/corpus/{name}", name.encode())
    assert names("memory://corpus") == ["a b.txt", "sub/c.txt"]
    listing = look_up(Source(path="memory://corpus"))
    assert [file.name for file in listing.unused] == ["sub/e.bin"]
    assert listing.left_out == {"names that begin with _ or .": {"count": 1, "examples": ["sub/_d.txt"]}}
    assert names("memory://corpus/**/*.txt") == ["a b.txt", "sub/_d.txt", "sub/c.txt"]
    assert names("memory://corpus/*.txt") == ["a b.txt"]
    (file,) = list_files(Source(path="memory://corpus/sub/c.txt"))
    with open_file(file.location) as stream:
        stream.seek(4)
        assert stream.read() == b"c.txt"
    before = file.identity
    remote.pipe("/corpus/sub/c.txt", b"SUB/c.txt")
    assert list_files(Source(path="memory://corpus/sub/c.txt"))[0].identity != before
    with pytest.raises(CorpusError, match="no file matches"):
        names("memory://nothing/*.txt")


def test_file_uris_are_local_paths(tree):
    assert names((tree / "b" / "c.jsonl").as_uri()) == ["c.jsonl"]


def test_unknown_filesystem_is_an_error():
    with pytest.raises(CorpusError, match="no filesystem reads nosuch://"):
        names("nosuch://bucket/x.txt")


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("a/b.JSONL.GZ", "auto", ("jsonl", "gz")),
        ("b.tsv.zst", "auto", ("csv", "zst")),
        ("README", "text", ("text", None)),
        ("x.data.bz2", "json", ("json", "bz2")),
        ("v1.2/x.feather", "auto", ("arrow", None)),
        ("a.jsonl.1", "auto", ("jsonl", None)),
        ("a.csv.2.gz", "auto", ("csv", "gz")),
        ("a.txt.zst.20240131", "auto", ("text", "zst")),
        ("a.parquet.7", "auto", ("parquet", None)),
    ],
)
def test_detect_format(name, asked, expected):
    assert detect_format(name, asked) == expected


@pytest.mark.parametrize(
    "name", ["README", "a.gz", "a.parquet.gz", "a.parquet.gz.1", "dir.txt/README", "a.1"]
)
def test_detect_format_refuses(name):
    with pytest.raises(CorpusError):
        detect_format(name, "auto")


# --- names that say no format


def parquet(text):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue()


def arrow(text, new=pa.ipc.new_stream):
    sink, table = io.BytesIO(), pa.table({"text": [text]})
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def lz4(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


LINE = b'{"text": "a"}\n'
CONTENTS = {
    "parquet": (parquet("a"), ("parquet", None)),
    "stream": (arrow("a"), ("arrow", None)),
    "arrow": (arrow("a", pa.ipc.new_file), ("arrow", None)),
    "lines": (LINE * 2, ("jsonl", None)),
    "array": (b"[" + LINE + b"]", ("json", None)),
    "object": (b'{\n  "text": "a"\n}', ("json", None)),
    "text": (b"{a} [b]", ("text", None)),
    "note": (b"[1] a", ("text", None)),
    "gzip": (gzip.compress(LINE), ("jsonl", "gz")),
    "zstd": (zstandard.compress(LINE), ("jsonl", "zst")),
    "bzip2": (bz2.compress(LINE), ("jsonl", "bz2")),
    "xz": (lzma.compress(b"a"), ("text", "xz")),
    "lz4": (lz4(LINE), ("jsonl", "lz4")),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["part-00000", "part-00000.gz", "events.log.1"])
def test_the_content_decides_where_no_name_says_a_format(tmp_path, kind, name):
    content, form = CONTENTS[kind]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        (file,) = list_files(Source(path=str(path)))
        assert (file.name, file.format, file.compression) == (name, *form)
    assert list((source := source_of(tmp_path, "fail")).texts(source.plan()))


def test_a_content_that_is_none_of_the_formats_is_refused(tmp_path):
    for n, content in enumerate(
        [b"\x00\x01\x02", b"\xff\xfe\xfd", gzip.compress(parquet("a")), "a\n".encode("utf-16")]
    ):
        path = tmp_path / str(n) / "part"
        path.parent.mkdir()
        path.write_bytes(content)
        for place in (path, path.parent):
            with pytest.raises(CorpusError, match="format"):
                names(place)
    assert names(tmp_path / "3", encoding="utf-16") == ["part"]


def test_the_content_is_asked_only_where_every_name_is_silent(tmp_path):
    (tmp_path / "part-0").write_bytes(LINE)
    (tmp_path / "LICENSE").write_text("free")
    assert names(tmp_path) == ["part-0"]
    (tmp_path / "more.doc").write_bytes(LINE)
    assert [file.name for file in look_up(Source(path=str(tmp_path))).unused] == ["more.doc"]
    (tmp_path / "a.jsonl").write_bytes(LINE)
    listing = look_up(Source(path=str(tmp_path)))
    assert [file.name for file in listing.files] == ["a.jsonl"]
    assert [file.name for file in listing.unused] == ["more.doc", "part-0"]
    assert names([str(tmp_path / "a.jsonl"), str(tmp_path / "part-0")]) == ["a.jsonl", "part-0"]


def test_a_file_without_an_extension_belongs_to_the_split_of_its_folder(tmp_path):
    for name in ("train/part-0", "test/part-0"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(LINE)
    assert names(tmp_path) == ["train/part-0"]
