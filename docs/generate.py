"""Generate docs/job.md from the schema, docs/support.md from the tests and the table in docs/autotrain.md from
raydist/autotrain/table.py: `python docs/generate.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from raydist.autotrain.table import ALIASES, OTHERS, TABLE, Parameter
from raydist.job.schema import Job

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import families  # noqa: E402 - found by the line above
from tests.unit.parallel import matrix  # noqa: E402

HEAD = """\
# Every key of a job

Generated from the schema by `make docs`. An unknown key is refused; the message names the nearest known one. On the
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


SUPPORT = """\
# What works together

Generated from the tests by `make docs`. Each precision in the table is a case of
`tests/unit/parallel/test_strategies.py`: two workers train it, two workers and one worker resume its checkpoint,
plain transformers or peft load its `model/`, and `raydist export RUN --merge` merges it if it is an adapter.
`make test` runs the most useful cases, `make test-all` all of them.

"""

METHODS = {
    "full": "all weights",
    "lora": "LoRA",
    "int4": "LoRA, `quantization: int4`",
    "int8": "LoRA, `quantization: int8`",
    "grown": "LoRA, new tokens and a whole embedding",
}

NOTES = """\
0 means bit-identical, including the final weights. In bf16 the strategies round in different places; the differences
are of the size of bf16's rounding error. Under `zero` stage 3 in bf16 a resumed run is not bit-identical.

A checkpoint holds whole tensors by name in safetensors, whatever the strategy. So a run may be resumed under
another strategy and with another number of workers; the change from DDP to each of the others is tested in fp32. Also
in fp32, runs under `ddp`, `fsdp` and `zero` 1 to 3 are killed with SIGKILL and, resumed, end with the weights of an
undisturbed run; 12 steps with accumulation, clipping and tied embeddings agree with DDP's within 1e-5.

fp16 needs a GPU and is refused on CPU. Past that refusal the tests train all weights in it under each strategy, and
LoRA under `ddp`: first steps that overflow are skipped, and a resumed run ends as the undisturbed one, its loss scale
being part of the checkpoint. Under `fsdp` the activations between layers are fp16 too, which large models may
overflow whatever the scale is.

`zero` runs bf16 and fp16 as autocast over fp32 weights: DeepSpeed's own modes would round the weights and the rotary
frequencies at the start. The scale of fp16 is raydist's; DeepSpeed's own for autocast clips by the scaled norm.
Under `fsdp` and `zero` stage 3 only rank 0 reads the model, and the others receive their shards from it. A quantized
base is read and quantized by every worker, which has it whole on its device for a moment, before it is sharded.

The tests run on CPU over gloo. On GPUs the same code uses NCCL; it has not been run there yet.
"""


def support_text() -> str:
    """The table of strategies, and the tolerances."""
    lines = [f"| strategy | {' | '.join(METHODS.values())} |", "|---|" + "---|" * len(METHODS)]
    for name in matrix.STRATEGIES:
        cells = [_precisions(name, m) for m in METHODS]
        lines.append(f"| {_strategy(name)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Losses may differ by at most (relative difference):",
        "",
        "| | fp32 | bf16 |",
        "|---|---|---|",
    ]
    lines += [
        f"| {what} | {limits['fp32']:g} | {limits['bf16']:g} |" for what, limits in matrix.WITHIN.items()
    ]
    return SUPPORT + "\n".join(lines) + "\n\n" + NOTES + "\n" + families_text()


FAMILIES = """\
## Families of models

A tiny random model of each family: packed documents have the loss that transformers gives to each of them alone
(`tests/unit/model/test_families.py`), and the family trains, resumes, exports and merges under `ddp`, `fsdp` and `zero`
stage 3 (`tests/unit/parallel/test_families.py`, in `make test-all`). Other families are tried in the same way when a
run starts: a block of two documents must not show one to the other. BLOOM and MPT, which have no positions of
their own, pass as well.

"""

REFUSED = """\

Of a multimodal model the text side is trained; vision and audio towers and projectors are frozen, get no adapter, and
are exported as they were. The router's loss is in the loss where the base's configuration has
`output_router_logits: true`, or as `train.router_aux_loss_coef` says. Experts need `adapter.dropout: 0`.
Quantized experts are dequantized a layer at a time, in the forward pass and again in the backward pass, and get no
adapter; a base with experts is loaded on the CPU first, which must have room for it in its own dtype.

These families take no packed documents, and are refused unless `packing.document_mask: false`:

"""


def families_text() -> str:
    """The table of families, and those that are refused."""
    lines = [
        "| family | all weights, LoRA, merged | `quantization` | documents kept apart by | router's loss |"
    ]
    lines += ["|---|---|---|---|---|"]
    for name in families.FAMILIES:
        bits = families.NO_INT4.get(name)
        masked = "its masks" if name in families.MASKED else "their positions or lengths"
        router = "yes" if name in families.MIXTURES else ""
        lines.append(
            f"| {name} | yes | {f'refused: {bits}' if bits else 'int4, int8'} | {masked} | {router} |"
        )
    refused = [f"- {name}: {why}." for name, (_, _, why) in families.REFUSED.items()]
    return FAMILIES + "\n".join(lines) + "\n" + REFUSED + "\n".join(refused) + "\n"


def _strategy(name: str) -> str:
    values = matrix.STRATEGIES[name]
    return ", ".join(f"`{key}: {value}`" for key, value in values.items())


def _precisions(strategy: str, method: str) -> str:
    return ", ".join(precision for s, m, precision in matrix.CASES if (s, m) == (strategy, method))


MARKS = ("<!-- parameters: made by `make docs` from raydist/autotrain/table.py -->\n", "<!-- end -->\n")


def autotrain_text() -> str:
    """docs/autotrain.md with the table of parameters rewritten between its marks."""
    page = (ROOT / "docs" / "autotrain.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    lines = ["| parameter | default | key of the job | meaning |", "|---|---|---|---|"]
    for name, parameter in TABLE.items():
        names = " ".join(f"`{n}`" for n in [name, *(a for a, of in ALIASES.items() if of == name)])
        key = f"`{parameter.key}`" if parameter.key else ""
        lines.append(f"| {names} | {_default(parameter.default, False)} | {key} | {_described(parameter)} |")
    lines += ["", "Refused, each with its reason:", ""]
    lines += [f"- {', '.join(f'`{n}`' for n in names.split())}: {why}" for names, why in OTHERS.items()]
    return before + MARKS[0] + "\n".join(lines) + "\n" + end + after


def _described(parameter: Parameter) -> str:
    values = [str(value) for value in parameter.values or () if value is not None]
    listed = f"; {' / '.join(values)}" if len(values) > 1 or values[:1] != [parameter.default] else ""
    needs = f"; only with `{parameter.needs[0]}`" if parameter.needs else ""
    return f"{parameter.meaning}{listed if values else ''}{needs}"


if __name__ == "__main__":
    (ROOT / "docs" / "job.md").write_text(text(), encoding="utf-8")
    (ROOT / "docs" / "support.md").write_text(support_text(), encoding="utf-8")
    (ROOT / "docs" / "autotrain.md").write_text(autotrain_text(), encoding="utf-8")
