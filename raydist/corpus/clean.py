"""Cleaning: named steps and a user's own functions, applied in order to each document's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from raydist.errors import JobError
from raydist.fingerprint import fingerprint
from raydist.job.functions import import_function, source_of

Step = Callable[[str], str | None]

SPACES = re.compile(r"[ \t]+")
LINE_ENDS = re.compile(r"[ \r]+(?=\n)")
NEWLINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Cleaner:
    """Calls the steps in order. A result of None or "" drops the document.

    fingerprint: changes with the steps, their options and the source code of the user's modules.
    """

    steps: tuple[Step, ...]
    fingerprint: str

    def __call__(self, text: str) -> str | None:
        for step in self.steps:
            cleaned = step(text)
            if not cleaned:
                return cleaned
            text = cleaned
        return text


def make_cleaner(steps: Sequence[str | dict[str, Any]]) -> Cleaner:
    """steps: names, {name: options} or module:function.

    JobError: an unknown step, wrong options, or a function without source code.
    """
    made = [_step(step, f"corpus.clean[{index}]") for index, step in enumerate(steps)]
    return Cleaner(tuple(step for step, _ in made), fingerprint([identity for _, identity in made]))


def _step(step: str | dict[str, Any], where: str) -> tuple[Step, list[Any]]:
    """The step, and JSON that identifies it."""
    if isinstance(step, str) and ":" in step:
        return _user_step(step, where)
    if isinstance(step, dict) and len(step) != 1:
        raise JobError(
            f"a cleaning step of {len(step)} names: {', '.join(map(str, step)) or 'none'}", where=where,
            fix="write each step as an entry of its own: {name: options}",
        )  # fmt: skip
    name, options = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    if name not in STEPS:
        near = get_close_matches(str(name), STEPS, 1, 0.5)
        raise JobError(
            f"no cleaning step is called {name}", where=where, why=f"the steps are {', '.join(STEPS)}",
            fix=f"did you mean {near[0]}?" if near else "for a function of your own, write module:function",
        )  # fmt: skip
    if name == "min_words" and isinstance(options, int):
        options = {"count": options}
    make, example = STEPS[name]
    try:
        return make(**(options or {})), [name, options or {}]
    except (TypeError, ValueError, re.error, IndexError) as error:
        raise JobError(
            f"the options of {name} are wrong: {options}", where=where, why=str(error),
            fix=f"as in {example}",
        ) from error  # fmt: skip


# --- named steps


def _whitespace(text: str) -> str:
    """One space between words, none at line ends, at most one empty line, nothing around the text."""
    text = LINE_ENDS.sub("", SPACES.sub(" ", text))
    return NEWLINES.sub("\n\n", text).strip()


def _make_characters(*, pattern: str, replacement: str = "") -> Step:
    compiled = re.compile(pattern)
    compiled.sub(replacement, "")  # raises for a replacement that names a group which the pattern lacks
    return partial(compiled.sub, replacement)


def _make_min_words(*, count: int) -> Step:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}, not a whole number from 1")
    return partial(_with_words, count)


def _with_words(count: int, text: str) -> str | None:
    return text if len(text.split(maxsplit=count)) >= count else None


STEPS: dict[str, tuple[Callable[..., Step], str]] = {
    "whitespace": (lambda: _whitespace, "whitespace"),
    "characters": (_make_characters, "{characters: {pattern: '[\\u200b]', replacement: ''}}"),
    "min_words": (_make_min_words, "{min_words: {count: 20}}"),
}
"""By name: the function that makes the step from its options, and an example."""


# --- a user's own functions


def _user_step(path: str, where: str) -> tuple[Step, list[Any]]:
    function = import_function(path, where)
    try:
        source = source_of(function)
    except (TypeError, OSError) as error:
        raise JobError(
            f"{path} has no source code", where=where,
            why="tokens are used again while the cleaning stays the same, which its source code shows",
            fix="wrap it in a function in a module of your own",
        ) from error  # fmt: skip
    return partial(_checked, function, path), [path, *source]


def _checked(function: Callable[[str], Any], path: str, text: str) -> str | None:
    cleaned = function(text)
    if cleaned is None or isinstance(cleaned, str):
        return cleaned
    raise JobError(
        f"{path} returned {type(cleaned).__name__}, not a string or None", where="corpus.clean",
        why="the text of a document is a string; None drops the document", fix="correct the function",
    )  # fmt: skip
