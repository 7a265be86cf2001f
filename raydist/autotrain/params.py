"""AutoTrain's parameters: checked, with every problem in one error, and turned into a job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from raydist.autotrain.data import FindData, find_data
from raydist.autotrain.table import ALIASES, INT, OTHERS, TABLE
from raydist.bucket.mirror import is_remote
from raydist.errors import JobError, RaydistError
from raydist.job.load import build_job
from raydist.job.schema import Job
from raydist.job.values import KeyPath, put
from raydist.redact import redacted
from raydist.storage import SHARED

REQUIRED = ("model", "data_path", "project_name")
NEVER = 10**9
"""Steps between checkpoints if only the last step is to have one."""

MODEL_SUFFIXES = (".json", ".safetensors", ".md", ".txt", ".model", ".jinja")


class LLMTrainingParams:
    """AutoTrain's parameters, as keywords or set later; docs/autotrain.md has the table.

    A wrong name or value raises JobError at once, a wrong combination when the job is made.
    """

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        doubles = [name for name in given if ALIASES.get(name) in given]
        known = {ALIASES.get(name, name): value for name, value in given.items() if name not in doubles}
        object.__setattr__(self, "given", {name: plain(name, value) for name, value in known.items()})
        twice = [f"{name}: it is another name of {ALIASES[name]}, which is given too" for name in doubles]
        refuse([*twice, *as_lines(wrong_values(self.given))])

    @classmethod
    def unchecked(cls, given: Mapping[str, Any]) -> LLMTrainingParams:
        """Parameters without a check; `job` reports every problem at once."""
        parameters = cls()
        parameters.given.update({name: plain(name, value) for name, value in given.items()})
        return parameters

    def __setattr__(self, name: str, value: Any) -> None:
        name = ALIASES.get(name, name)
        refuse(as_lines(wrong_values({name: plain(name, value)})))
        self.given[name] = plain(name, value)

    def __getattr__(self, name: str) -> Any:
        name = ALIASES.get(name, name)
        if name not in TABLE:
            raise AttributeError(f"no parameter {name}{_nearest(name)}")
        return self.given.get(name, TABLE[name].default)

    def to_json(self) -> dict[str, Any]:
        """Every parameter with its value, the token redacted."""
        kept = {name: "(redacted)" if name == "token" else getattr(self, name) for name in TABLE}
        return {name: redacted(value) for name, value in kept.items()}

    def job(self, more_problems: Iterable[str] = ()) -> Job:
        """Raises JobError with every problem, including `more_problems`."""
        return build_job(self.job_values(more_problems))

    def job_values(self, more_problems: Iterable[str] = ()) -> dict[str, Any]:
        """The job as plain values, without the keys that keep raydist's defaults. Raises as `job`."""
        wrong = refusals(self.given)
        missing = [f"{name}: it is required" for name in REQUIRED if getattr(self, name) is None]
        problems = [*missing, *as_lines(wrong), *more_problems]
        rest = LLMTrainingParams(**{name: value for name, value in self.given.items() if name not in wrong})
        values: dict[str, Any] = {}
        try:
            values = {} if missing else mapped(rest)
            if values:
                fit_block_size(rest, values)
        except RaydistError as error:
            lines = error.what.splitlines()  # a job's error: the number of problems, then one a line
            problems += [line.strip() for line in lines[1:]] or [in_a_line(error)]
        refuse(problems)
        return values


def refuse(problems: list[str]) -> None:
    """Raises JobError if there are problems."""
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the parameters\n"
        raise JobError(
            count + "\n".join(f"  {problem}" for problem in problems),
            fix="docs/autotrain.md explains every parameter; raydist llm --help lists them",
        )


def as_lines(wrong: Mapping[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in wrong.items()]


def in_a_line(error: RaydistError) -> str:
    """The four parts of the error in one line."""
    return "; ".join(filter(None, (f"{error.where}: {error.what}".lstrip(": "), error.why, error.fix)))


# --- what is wrong --------------------------------------------------------------------------------


def refusals(given: dict[str, Any]) -> dict[str, str]:
    """Parameter -> why it is refused: its value is wrong, or the other parameters leave it without effect."""
    return {**dict(_without_effect(given)), **wrong_values(given)}


def wrong_values(given: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> what is wrong with its value."""
    return {name: why for name, value in given.items() if (why := _wrong(name, value))}


def _wrong(name: str, value: Any) -> str:
    if name not in TABLE:
        reasons = (why for names, why in OTHERS.items() if any(fnmatch(name, n) for n in names.split()))
        return next(reasons, f"no such parameter{_nearest(name)}")
    parameter = TABLE[name]
    if name == "block_size" and isinstance(value, list):
        sizes = "{block_size: 512, max_tokens: 1e6}, ..."
        return f"give one size; for several, one after another in one run, give the job `stages: [{sizes}]`"
    if name == "token" and isinstance(value, str) and value.startswith("hf_"):
        return "give no token itself: name an environment variable, or a file, that holds it"
    if value is None and parameter.default is None and name not in REQUIRED:
        return ""
    if not isinstance(value, parameter.kinds) or (isinstance(value, bool) and bool not in parameter.kinds):
        shown = "the value" if name == "token" else repr(value)
        return f"{shown} is not {' or '.join(kind.__name__ for kind in parameter.kinds)}"
    if parameter.values is not None and value not in parameter.values:
        known = ", ".join(str(v) for v in parameter.values if v is not None)
        return f"{value} {parameter.refused}; known: {known}"
    if name == "block_size" and isinstance(value, int) and value < 8 and value != -1:
        return f"{value} is neither -1 nor a number of tokens from 8"
    return ""


def _nearest(name: str) -> str:
    near = get_close_matches(name, [*TABLE, *ALIASES], 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _without_effect(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    now = {**{name: parameter.default for name, parameter in TABLE.items()}, **given}
    for name, value in given.items():
        if name in TABLE and (needs := TABLE[name].needs) and value is not None and value is not False:
            other, wanted = needs
            if now[other] != wanted:
                yield name, f"it has an effect only with {other} {_shown(wanted)}, not {_shown(now[other])}"
    if now["scheduler"] == "constant" and "warmup_ratio" in given:
        yield "warmup_ratio", "scheduler constant has no warm-up; use constant_with_warmup"
    if now["eval_strategy"] == "no":
        for name in ("valid_split", "load_best_model_at_end"):
            if now[name]:
                yield name, "nothing is evaluated with eval_strategy no"
    if now["push_to_hub"] and not now["username"]:
        yield "push_to_hub", "username is missing: the repository is username/<name of the project>"


def _shown(value: Any) -> str:
    return {"True": "on", "False": "off", "None": "unset"}.get(str(value), str(value))


def plain(name: str, value: Any) -> Any:
    """`value` as the parameter's type: a command line and a YAML file give words and other numbers."""
    if name not in TABLE:
        return value
    parameter = TABLE[name]
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    if isinstance(value, str) and parameter.default is None and value.lower() in ("none", "null", ""):
        return None
    if name == "resume_from_checkpoint" and isinstance(value, str):
        return {"true": True, "auto": True, "false": False}.get(value.lower(), value)
    if parameter.kinds == INT and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# --- the job ---------------------------------------------------------------------------------------


def mapped(p: LLMTrainingParams, find: FindData = find_data) -> dict[str, Any]:
    """The job's values, without the block size. Raises JobError if there is no such data."""
    folder = Path(p.project_name).expanduser()
    if is_remote(p.project_name):
        raise JobError(
            f"{p.project_name} is a URI, and a project is a folder", where="project_name",
            fix="name a folder; or write a job file, whose storage may be a bucket: raydist init",
        )  # fmt: skip
    values: dict[str, Any] = {"name": run_name(folder), "storage": str(folder)}
    for name in DIRECT:
        value, parameter = getattr(p, name), TABLE[name]
        value = parameter.values.get(value) if parameter.values else value
        put(values, parameter.key.split("."), value)
    train, valid = find(p.data_path, p.train_split, p.valid_split)
    _refuse_inside(folder, train)
    values["corpus"] = {"sources": {"train": _source(p, train)}}
    values["eval"] = {"sources": {"valid": _source(p, valid)}} if valid else {}
    if valid or p.eval_strategy == "no":
        values["corpus"]["holdout"] = 0.0
    _put_steps(p, values)
    _put_batch(p, values)
    if p.use_flash_attention_2:
        values["model"]["attn_implementation"] = "flash_attention_2"
    if p.peft:
        values["adapter"] = {TABLE[n].key.partition(".")[2]: getattr(p, n) for n in LORA_KEYS}
        values["adapter"]["target_modules"] = modules(p.target_modules)
    return values


DIRECT = (
    "model", "epochs", "lr", "warmup_ratio", "scheduler", "weight_decay", "max_grad_norm", "add_eos_token",
    "mixed_precision", "gradient_checkpointing", "quantization", "distributed_backend", "seed",
    "save_total_limit", "load_best_model_at_end", "log",
)  # fmt: skip
LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")


def run_name(folder: Path) -> str:
    """The name of the project's folder as a valid run name, which differs from every file of a model."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:90] or "model"
    taken = name in SHARED or name.endswith(MODEL_SUFFIXES)
    return f"{name}-run" if taken else name


def _refuse_inside(folder: Path, train: list[str]) -> None:
    for path in train:
        if folder.resolve().is_relative_to(Path(path).expanduser().resolve()):
            raise JobError(
                f"{folder} is inside {path}, where every file is training text", where="project_name",
                fix="choose a folder outside, or give the text's files as data_path",
            )  # fmt: skip


def _source(p: LLMTrainingParams, paths: list[str]) -> dict[str, Any]:
    return {"path": paths[0] if len(paths) == 1 else paths, "text_column": p.text_column}


def _put_steps(p: LLMTrainingParams, values: dict[str, Any]) -> None:
    if p.eval_strategy != "no":
        values["eval"]["eval_steps"] = p.eval_steps if p.eval_strategy == "steps" else "epoch"
    save = {"epoch": "epoch", "steps": p.save_steps, "no": NEVER}[p.save_strategy]
    values["checkpoint"]["save_steps"] = save
    train = values["train"]
    if p.logging_steps != -1:
        train["logging_steps"] = p.logging_steps
    if p.scheduler == "constant":
        train["warmup_ratio"] = 0.0
    if p.max_grad_norm == 0:
        train["max_grad_norm"] = None


def _put_batch(p: LLMTrainingParams, values: dict[str, Any]) -> None:
    workers = (gpus() or 1) if p.num_workers is None else p.num_workers
    values["scaling"] = {"num_workers": workers}
    values["train"]["global_batch_size"] = p.batch_size * p.gradient_accumulation * workers
    values["train"]["micro_batch_size"] = "auto" if p.auto_find_batch_size else p.batch_size


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def modules(named: str | list[str]) -> str | list[str]:
    """`a, b` -> [a, b]; all-linear as it is."""
    if isinstance(named, str) and named != "all-linear":
        return [name.strip() for name in named.split(",") if name.strip()]
    return named


def fit_block_size(p: LLMTrainingParams, values: dict[str, Any]) -> None:
    """Set the block size; -1: the model's positions. Raises JobError if block or job do not fit the model."""
    from raydist.model.build import check_fits, load_config

    places: dict[KeyPath, str] = {
        tuple(parameter.key.split(".")): name for name, parameter in reversed(TABLE.items())
    }
    size = p.max_seq_length if p.block_size == -1 else p.block_size
    values["packing"]["block_size"] = size
    config = load_config(build_job(values, places, "job"))
    positions = getattr(config, "max_position_embeddings", None)
    if p.block_size == -1 and positions is not None:
        values["packing"]["block_size"] = min(positions, size)
    check_fits(config, build_job(values, places, "job"))
