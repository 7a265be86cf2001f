"""Write docs/job.md, the table of all job keys, from the schema: `python docs/generate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from raydist.job.schema import Job

HEAD = """\
# Every key of a job

Made from the schema by `make docs`. Unknown keys are refused, with the nearest known one. On the
command line a key is set by `--set train.lr=1e-4`, in Python by `Job(train={"lr": 1e-4}, ...)`.

| key | default | meaning |
|---|---|---|
"""


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = list(_sections(field.annotation))
        named = get_origin(field.annotation) is dict and inner
        if field.description or not inner:
            default = _default(field.get_default(call_default_factory=True), bool(inner))
            yield f"| `{prefix}{name}` | {default} | {_meaning(field)} |"
        for sub in inner:
            yield from rows(sub, f"{prefix}{name}.NAME." if named else f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _default(value: Any, is_section: bool) -> str:
    if value is PydanticUndefined:
        return "" if is_section else "(none)"
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(field: Any) -> str:
    choices = [repr(c) if not isinstance(c, str) else c for c in _choices(field.annotation)]
    text = field.description or ""
    return f"{text}{'; ' if text and choices else ''}{' / '.join(choices)}".replace("|", "\\|")


def _choices(annotation: Any) -> list[Any]:
    if str(get_origin(annotation)) == "typing.Literal":
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def text() -> str:
    return HEAD + "\n".join(rows(Job)) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "job.md").write_text(text(), encoding="utf-8")
