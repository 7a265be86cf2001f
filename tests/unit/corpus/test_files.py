"""Paths, folders, globs and URIs become one sorted list of files with identities."""

import os
import sysconfig
from pathlib import Path

import fsspec
import pytest

from raydist.corpus.files import list_files
from raydist.corpus.formats import detect_format
from raydist.corpus.locations import open_file
from raydist.errors import CorpusError
from raydist.job.schema import Source


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
    ],
)
def test_detect_format(name, asked, expected):
    assert detect_format(name, asked) == expected


@pytest.mark.parametrize("name", ["README", "a.gz", "a.parquet.gz", "dir.txt/README"])
def test_detect_format_refuses(name):
    with pytest.raises(CorpusError):
        detect_format(name, "auto")
