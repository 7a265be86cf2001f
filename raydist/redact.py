"""Secrets in text: replaced by *** wherever text leaves this process.

RaydistError redacts its own parts, so that whatever shows, sends or stores an error shows no secret. What
else leaves goes through here too: a run's job and status, records, reports, trackers, tracebacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_KEYS = r"(?:api|access|account|secret|private|shared|storage|encryption)_?key"
_COLON = rf"(?:password|passwd|passphrase|secret|{_KEYS}|(?:sas|access|auth|hub|hf|bearer)_?token)"
"""Endings of names whose values are secrets, also after a colon."""

_NOT_OF_A_TOKENIZER = r"(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token"
_EQUALS = rf"(?:{_COLON}|pwd|credentials?|signature|(?<![a-z])(?:sig|sas)|{_NOT_OF_A_TOKENIZER})"
"""The same in a query, where shorter names are in use."""

_PORT = r"\d{1,5}(?:/?(?:[\s,;)\]]|$))"

_BEGINS = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2}))"
_PREFIX = r"(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|AIza)"

_PARTS = (
    # user:password@ in a URI; the password may hold slashes, spaces, @, or quotes
    (re.compile(rf"(?<=://)[^\s@/:'\"<>]*:(?!{_PORT})[^'\"<>\n]{{0,300}}?@(?![^\s/'\"]*@)"), f"{MASK}@"),
    (re.compile(rf"(?<=://)[^\s@/:]*:(?!{_PORT}|{re.escape(MASK)})\S{{0,300}}?@(?!\S*@)"), f"{MASK}@"),
    (re.compile(r"(?<=://)[^\s@/'\"<>]+@"), f"{MASK}@"),
    # name=value, as in a query or a connection string
    (re.compile(rf"({_EQUALS}(?:=|%3D))[^&;\s'\",)\]}}]+", re.I), rf"\1{MASK}"),
    # name: value, as in YAML, JSON and headers
    (re.compile(rf"({_COLON}['\"]?\s*:\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,}}\]'\"]+)", re.I), rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{16,}", re.I), rf"\1{MASK}"),
    # tokens that are known by their form
    (re.compile(rf"{_BEGINS}{_PREFIX}[A-Za-z0-9_-]{{8,}}"), MASK),
    (re.compile(rf"{_BEGINS}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]*"), MASK),
)


def redact(text: str) -> str:
    """`text` with *** for passwords in URIs, signatures and tokens in queries, and values of secret names."""
    for pattern, replacement in _PARTS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """Plain values with every text in them redacted, and *** for a text under the name of a secret."""
    if isinstance(value, Mapping):
        return {key: _of_name(key, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _of_name(key: Any, value: Any) -> Any:
    secret = isinstance(value, str) and value and _NAME.fullmatch(str(key))
    return MASK if secret else redacted(value)


_NAME = re.compile(rf"[\w.-]*{_COLON}", re.I)


def is_redacted(text: str) -> bool:
    """Whether a secret was taken out of this path or URI, so that it opens nothing any more."""
    return MASK in text
