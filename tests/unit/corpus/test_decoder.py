"""Damaged parquet and Arrow files crash the process that decodes them, and no other."""

import signal
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydist.corpus.files import list_files
from raydist.corpus.formats import Bad, Part, ReadOptions, Record, check_column, cut_file, decoder, read_part
from raydist.corpus.formats.records import WHOLE
from raydist.corpus.source import open_source
from raydist.errors import CorpusError
from raydist.job.schema import Corpus, Source

DAMAGED = Path(__file__).parent / "damaged"
"""One byte of each is wrong. pyarrow aborts on two; the others it reads outside of their bounds, if let."""
OPTIONS = ReadOptions("auto", "text", "line")
TEXTS = [f"document {i}" for i in range(12)]
PATCHED = """
import json, os, sys, time
sys.path[:] = json.loads(sys.argv[1])
from raydist.corpus.formats import columns, decoder
whole = columns._items
def items(array, first, path):
    texts = array.to_pylist()
    {}
    return whole(array, first, path)
columns._items = items
decoder.serve(int(sys.argv[2]))
"""


@pytest.fixture
def patched(monkeypatch):
    """Decoders that run a line of Python over the texts of each piece before they give it."""

    def patch(line):
        decoder._end_idle()
        monkeypatch.setattr(decoder, "START", PATCHED.format(line))

    yield patch
    decoder._end_idle()


def decoders():
    """Those of this process that live."""
    return [child for child in psutil.Process().children() if "serve(int" in " ".join(child.cmdline())]


def opened(path):
    (file,) = list_files(Source(path=str(path)))
    return file


def read(file, part=WHOLE):
    return [item for items in read_part(file, part, OPTIONS) for item in items]


def texts(items):
    return [item.text for item in items if isinstance(item, Record)]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Bad)]


def parquet(path):
    """Three row groups of four texts."""
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=4)
    return opened(path)


@pytest.mark.parametrize("name", sorted(path.name for path in DAMAGED.iterdir()))
def test_what_crashes_a_reader_is_one_bad_file(name):
    file = opened(DAMAGED / name)
    check_column(file, OPTIONS)
    (reason,) = reasons(read(file))
    assert "damaged" in reason
    cut_file(file, 100, OPTIONS)


def test_a_corpus_with_files_that_crash_is_planned_and_read(tmp_path):
    for path in DAMAGED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    parquet(tmp_path / "z.parquet")
    corpus = Corpus(sources={"a": {"path": str(tmp_path)}}, slice_bytes=2**20)
    source = open_source(Source(path=str(tmp_path)), corpus)
    assert set(TEXTS) <= set(source.texts(source.plan()))


def test_only_the_row_group_that_crashes_is_lost(tmp_path, patched):
    patched("if 'document 5' in texts: os.abort()")
    items = read(parquet(tmp_path / "a.parquet"))
    assert texts(items) == TEXTS[:4] + TEXTS[8:]
    assert [item.row for item in items if isinstance(item, Record)] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert reasons(items) == ["the decoder crashed (signal SIGABRT) on its row group 1: the file is damaged"]


@pytest.mark.slow
def test_the_rest_is_given_up_after_some_crashes(tmp_path, patched, monkeypatch):
    monkeypatch.setattr(decoder, "CRASHED_UNITS", 1)
    patched("if 'document 0' in texts: os.abort()")
    items = read(parquet(tmp_path / "a.parquet"))
    assert not texts(items)
    assert reasons(items)[1:] == [
        "the decoder crashed on 1 of its parts before: row group 1 to 2 was not read"
    ]


@pytest.mark.slow
def test_a_decoder_that_does_not_answer_counts_as_crashed(tmp_path, patched, monkeypatch):
    monkeypatch.setattr(decoder, "PATIENCE_SECONDS", 2.0)
    patched("if 'document 5' in texts: time.sleep(100)")
    items = read(parquet(tmp_path / "a.parquet"), Part(0, 1, 2))
    assert reasons(items) == [
        "the decoder crashed (no answer for 2 s) on its row group 1: the file is damaged"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_decoder_that_is_killed_now_and_then_loses_and_repeats_nothing(tmp_path, number):
    """Crashes that do not come again at the same place are not the file's fault either."""
    decoder._end_idle()
    found = []
    for items in read_part(parquet(tmp_path / "a.parquet"), WHOLE, OPTIONS):
        found += items
        if len(found) in (4, 8):
            (child,) = decoders()
            child.send_signal(number)
    assert texts(found) == TEXTS and not reasons(found)


@pytest.mark.slow
def test_decoders_that_are_killed_again_and_again_are_not_the_files_fault(tmp_path, patched):
    patched("if 'document 5' in texts: os.kill(os.getpid(), 9)")
    with pytest.raises(CorpusError, match=r"a\.parquet was killed 3 times \(signal SIGKILL\)") as caught:
        read(parquet(tmp_path / "a.parquet"))
    assert "memory" in str(caught.value)


def test_too_little_memory_is_an_error_that_names_the_file(tmp_path, patched):
    patched("if 'document 5' in texts: raise MemoryError('malloc of size 99 failed')")
    with pytest.raises(CorpusError, match=r"too little memory to decode a\.parquet") as caught:
        read(parquet(tmp_path / "a.parquet"))
    assert "malloc of size 99 failed" in str(caught.value)


def test_a_file_that_asks_for_more_memory_than_it_can_need_is_bad(tmp_path, patched):
    patched("if 'document 5' in texts: raise MemoryError('malloc of size 876173328384 failed')")
    (reason,) = reasons(read(parquet(tmp_path / "a.parquet")))
    assert reason.startswith("the file is damaged: malloc of size 876173328384 failed")


def test_whatever_a_decoder_raises_is_one_bad_file(tmp_path, patched):
    patched("if 'document 5' in texts: raise IndexError('list index out of range')")
    assert reasons(read(parquet(tmp_path / "a.parquet"))) == [
        "the file is damaged: IndexError: list index out of range"
    ]


def test_a_decoder_that_cannot_start_is_no_files_fault(tmp_path, patched, monkeypatch):
    file = parquet(tmp_path / "a.parquet")
    decoder._end_idle()
    monkeypatch.setattr(decoder, "START", "import sys; sys.exit(3)")
    with pytest.raises(CorpusError, match=r"does not start \(exit status 3\)"):
        read(file)


def test_one_decoder_reads_many_files_and_those_left_in_the_middle(tmp_path):
    decoder._end_idle()
    file = parquet(tmp_path / "a.parquet")
    for _ in range(3):
        next(read_part(file, WHOLE, OPTIONS))
        assert texts(read(file)) == TEXTS
        assert len(cut_file(file, 100, OPTIONS)) == 3
        assert len(decoders()) == 1
    both = [read_part(file, WHOLE, OPTIONS) for _ in range(2)]
    assert [texts(next(items)) for items in both] == [TEXTS[:4]] * 2


@pytest.mark.slow
def test_a_decoder_ends_without_work(tmp_path, patched):
    decoder._end_idle()
    file = parquet(tmp_path / "a.parquet")
    patched("decoder.IDLE_SECONDS = 0.0")
    assert texts(read(file)) == TEXTS
    (child,) = decoders()
    assert psutil.wait_procs([child], timeout=30)[0]
    assert texts(read(file)) == TEXTS


def test_a_footer_with_fewer_rows_than_there_are_loses_none_in_silence(tmp_path):
    """The footer counts rows in several places; whichever is wrong, it is said."""
    path = tmp_path / "a.parquet"
    parquet(path)
    sound = path.read_bytes()
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    four, two = 8, 4  # as its integers are written
    places = [i for i in range(footer, len(sound) - 8) if sound[i] == four]
    assert places
    for place in places:
        path.write_bytes(sound[:place] + bytes([two]) + sound[place + 1 :])
        items = read(opened(path))
        assert texts(items) == TEXTS or reasons(items), place
