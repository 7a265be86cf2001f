"""The ledger: a line per commit, each with the hash of the line before it, so that no change goes unnoticed.

    {"id": "1-10", "previous": "1-5", ..., "before": xxh3-128 of the line above, null in the first line}

COMMIT.json holds a copy of its own line. So the lines that a ledger lost can be put back, where the chain of
hashes proves that they are the right ones. Lines of older versions have no "before"; they stand first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import xxhash

from raydist import files
from raydist.errors import CheckpointError
from raydist.folder import COMMIT, RunFolder

LOST = {"lost": True}
"""As a ledger's first line, written by a user: the lines before the next one are lost; the run may go on."""

Line = Mapping[str, Any]

RESTORE = (
    "restore it from a copy of the run's folder; or, to go on without that history, put the one line "
    f"{orjson.dumps(LOST).decode()} in its place"
)


def append(folder: RunFolder, values: Line) -> str:
    """Add a line and return it as it stands there, on disk."""
    before = read_lines(folder)
    line = orjson.dumps({**values, "before": _hash(before[-1]) if before else None}).decode()
    folder.append_ledger(line, len(before))
    return line


def read_lines(folder: RunFolder) -> list[bytes]:
    """The whole lines, whatever they hold; [] if there is no ledger."""
    if not folder.ledger_file.exists():
        return []
    whole, newline, _ = folder.ledger_file.read_bytes().rpartition(b"\n")
    return whole.split(b"\n") if newline else []


def make_whole(folder: RunFolder, newest: str, copies: Iterable[str]) -> str | None:
    """Put back what the ledger has lost. Returns what was wrong with it; None if nothing was.

    newest: the line of the commit that the run goes on from; "" if there is none, or an older version's.
    copies: the lines that COMMIT.json files hold. Raises CheckpointError if lines are lost for good.
    """
    file, aside = folder.ledger_file, folder.damaged_ledger
    existed, there = file.exists(), read_lines(folder)
    kept = _chain(there, newest, copies)
    if kept is None:
        raise CheckpointError(
            f"{file.name} " + ("has lost lines" if existed else "is missing"),
            where=str(file),
            why=f"no {COMMIT} holds them, so what was trained could not be accounted for",
            fix=RESTORE,
        )
    if kept == there:
        torn = files.cut_torn_line(file)
        return f"the last line of {file.name} was torn and is removed; it did not count" if torn else None
    if existed:
        file.replace(aside)
    folder.rewrite_ledger(kept)
    found = f"was damaged, and is kept as {aside.name}" if existed else "was missing"
    return f"{file.name} {found}; it was made again, with the lines that {COMMIT} files hold"


def damage(folder: RunFolder, newest: str) -> CheckpointError | None:
    """What is wrong with the ledger as it stands. newest: as in `make_whole`."""
    there = read_lines(folder)
    if _chain(there, newest, []) == there:
        return None
    return CheckpointError(
        f"{folder.ledger_file.name} is damaged",
        where=str(folder.ledger_file),
        why="its lines do not hold the hashes of the lines before them",
        fix=f"resume the run, which makes it again of the {COMMIT} files, or says what it lacks",
    )


def contradiction(
    folder: RunFolder,
    ledger: str,
    step: int,
    samples: int,
    tokens: Mapping[str, int],
    skipped: Mapping[str, int],
) -> str | None:
    """Why the ledger does not lead to a commit; None if it does.

    ledger: the id of the commit's line.  tokens: {tokens, eos, padding, bos} of the run up to it.  skipped:
    its {samples, tokens} that were not trained. The lines from the first to this one must follow each other
    and add up; one without bos or skipped has 0 of them.
    """
    lines = [_parsed(text) for text in read_lines(folder)]
    wanted: str | None = ledger
    for line in reversed(lines):
        if line is None or line.get("id") != wanted:
            continue
        try:
            if [line["steps"][1], line["samples"][1]] != [step, samples]:
                ends = f"step {line['steps'][1]}, sample {line['samples'][1]}"
                return f"line {wanted} ends at {ends}, not at step {step}, sample {samples}"
            step, samples, wanted = line["steps"][0], line["samples"][0], line["previous"]
            line = {"bos": 0, **line}
            tokens = {name: n - line[name] for name, n in tokens.items()}
            of_line = line.get("skipped", dict.fromkeys(skipped, 0))
            skipped = {name: n - of_line[name] for name, n in skipped.items()}
        except (KeyError, IndexError, TypeError):
            return f"line {wanted} is not one that raydist writes"
        if wanted is None:
            return (
                "its lines do not add up"
                if any((step, samples, *tokens.values(), *skipped.values()))
                else None
            )
    return None if lines[:1] == [LOST] else f"it has no line {wanted}"


def _chain(there: Sequence[bytes], newest: str, copies: Iterable[str]) -> list[bytes] | None:
    """The ledger as it was written: back from `newest` by the hashes, then on. None if a line is lost."""
    chain: list[bytes] = []
    if newest:
        known = {_hash(text): text for text in [*there, *(text.encode() for text in copies)]}
        chain = [newest.encode()]
        while (before := (_parsed(chain[0]) or {}).get("before")) is not None:
            if before not in known and not _is_lost(there[:1]):
                return None
            chain.insert(0, known.get(before, there[0]) if there else known[before])
        if not _is_chained(chain[0]):
            older = list(there[: there.index(chain[0])])
            if any(_parsed(text) is None or _is_chained(text) for text in older):
                return None
            chain = [*older, *chain]
    for text in there:
        if _follows(text, chain):
            chain.append(text)
    return chain


def _follows(text: bytes, chain: Sequence[bytes]) -> bool:
    """Whether a line can stand behind these: older versions' at the start, then each with the right hash."""
    line = _parsed(text)
    if line is None:
        return False
    if "before" not in line:
        return not chain or (text not in chain and not _is_chained(chain[-1]))
    if chain and _is_lost(chain[-1:]):
        return True
    return bool(line["before"] == (_hash(chain[-1]) if chain else None))


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def _is_chained(text: bytes) -> bool:
    return "before" in (_parsed(text) or {})


def _is_lost(lines: Sequence[bytes]) -> bool:
    return bool(lines) and _parsed(lines[0]) == LOST


def _hash(text: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(text)
