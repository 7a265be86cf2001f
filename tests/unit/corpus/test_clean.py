"""Named cleaning steps, functions of the user, and fingerprints that follow both."""

import importlib
import pickle
import sys

import pytest

from raydist.corpus.clean import make_cleaner
from raydist.errors import JobError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user, and how to write it again."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source):
        (tmp_path / "users_cleaning.py").write_text(source)
        importlib.invalidate_caches()
        sys.modules.pop("users_cleaning", None)
        import linecache

        linecache.clearcache()

    yield write
    sys.modules.pop("users_cleaning", None)


def test_no_steps_leave_the_text_alone():
    text = " \t a\u2028 \r\n\n\n\n"
    assert make_cleaner([])(text) is text
    assert make_cleaner([])("") == ""


def test_whitespace():
    clean = make_cleaner(["whitespace"])
    assert clean("  a \t b  \r\n \n\n\n\n  c\u2028d\t\n") == "a b\n\n c\u2028d"
    assert not clean(" \n\t\r\n ")


def test_characters():
    clean = make_cleaner([{"characters": {"pattern": r"(\d)-(\d)", "replacement": r"\1 to \2"}}])
    assert clean("1-2, a-b") == "1 to 2, a-b"
    assert make_cleaner([{"characters": {"pattern": "[\u200b\ufeff]"}}])("a\u200bb\ufeff") == "ab"


def test_min_words_in_both_spellings():
    for step in [{"min_words": {"count": 3}}, {"min_words": 3}]:
        clean = make_cleaner([step])
        assert clean("one two") is None
        assert clean(" one two\nthree four ") == " one two\nthree four "
    assert (
        make_cleaner([{"min_words": 3}]).fingerprint
        == make_cleaner([{"min_words": {"count": 3}}]).fingerprint
    )


def test_steps_run_in_order_and_stop_at_a_dropped_document():
    assert make_cleaner([{"characters": {"pattern": "x"}}, {"min_words": 2}])("x y") is None
    assert make_cleaner([{"min_words": 2}, {"characters": {"pattern": "x"}}])("x y") == " y"


def test_fingerprints_differ_where_the_cleaning_does():
    steps = [[], ["whitespace"], [{"min_words": 2}], [{"min_words": 3}], ["whitespace", {"min_words": 2}],
             [{"min_words": 2}, "whitespace"]]  # fmt: skip
    assert len({make_cleaner(step).fingerprint for step in steps}) == len(steps)
    assert make_cleaner(["whitespace"]).fingerprint == make_cleaner([{"whitespace": {}}]).fingerprint


def test_a_function_of_the_user_and_its_source(module):
    source = "def helper(t):\n    return t.upper()\n\ndef f(t):\n    return helper(t) if t != 'x' else None\n"
    module(source)
    clean = make_cleaner(["users_cleaning:f"])
    assert (clean("a"), clean("x")) == ("A", None)
    assert pickle.loads(pickle.dumps(clean))("a") == "A"
    assert make_cleaner(["users_cleaning:f"]).fingerprint == clean.fingerprint
    module(source.replace("upper", "lower"))
    assert make_cleaner(["users_cleaning:f"]).fingerprint != clean.fingerprint


def test_a_function_that_gives_no_text_is_an_error(module):
    module("def f(text):\n    return len(text)\n")
    with pytest.raises(JobError, match="users_cleaning:f returned int"):
        make_cleaner(["users_cleaning:f"])("abc")


@pytest.mark.parametrize(
    ("step", "message", "hint"),
    [
        ("whitespaces", "no cleaning step is called whitespaces", "did you mean whitespace?"),
        ({"min_word": 3}, "no cleaning step is called min_word", "did you mean min_words?"),
        ("zzz", "no cleaning step is called zzz", "module:function"),
        ({"min_words": {"count": 0}}, "options of min_words are wrong", "count: 20"),
        ({"min_words": {"counts": 2}}, "options of min_words are wrong", "count: 20"),
        ("min_words", "options of min_words are wrong", "count: 20"),
        ({"characters": {"pattern": "("}}, "options of characters are wrong", "pattern"),
        (
            {"characters": {"pattern": "a", "replacement": "\\2"}},
            "options of characters are wrong",
            "pattern",
        ),
        ({"a": 1, "b": 2}, "a cleaning step of 2 names", "entry of its own"),
        ("no_such_module:f", "cannot import no_such_module:f", "PYTHONPATH"),
        ("json:no_such", "cannot import json:no_such", "PYTHONPATH"),
        ("builtins:str", "builtins:str has no source", "wrap it"),
    ],
)
def test_wrong_steps_are_refused_with_the_way_out(step, message, hint):
    with pytest.raises(JobError, match=message) as caught:
        make_cleaner(["whitespace", step])
    assert caught.value.where == "corpus.clean[1]"
    assert hint in caught.value.fix
