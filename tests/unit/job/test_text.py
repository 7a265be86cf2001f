"""A few bytes that ask for all the memory, or for more than Python's stack, are refused in a sentence."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raydist.cluster.launch import load_cluster
from raydist.errors import ClusterError, JobError
from raydist.job.load import load_job
from raydist.job.text import MOST_LEVELS, parse_json, parse_yaml

MINIMAL = """\
name: small
model: {base: some/model}
corpus: {sources: {prose: {path: data}}}
train: {max_steps: 10}
"""
NINE = ",".join(["*{0}"] * 9)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{NINE.format(before)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Some 300 bytes for 9^8 values."""

BOMBS = {
    LAUGHS: "as often as aliases repeat them",
    "a: &a {b: &b [*a]}": r"\*a contains itself",
    "a: " + "[" * 5_000: f"more than {MOST_LEVELS} levels",
    "a: " + "{a: " * 5_000: f"more than {MOST_LEVELS} levels",
    "x: " + "y" * 2**20: "more than 1,048,576 bytes",
    "? [a]\n: b": "a key is a word",
    "a: 2026-13-45": "not valid YAML",
    "a: 2026-01-01": "a is a date; a job has text",
    "a: !!binary aGk=": "a is a bytes",
    "a: [!!set {b}]": r"a\[0\] is a set",
    "a: " + "9" * 5_000: "not valid YAML",
    "a: !!int b": "not valid YAML",
    "a: !!bool b": "not valid YAML",
    "a: !!timestamp b": "not valid YAML",
    "a: !!python/object/apply:os.system [id]": "not valid YAML",
    "a: 1\n---\nb: 2": "not valid YAML",
    "a: *b": "not valid YAML",
    "\0": "not valid YAML",
}


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: repr(text[:24]))
def test_yaml_that_is_no_job_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL + text)
    with pytest.raises(JobError, match=BOMBS[text]):
        load_job(path)
    with pytest.raises(ClusterError):
        load_cluster(str(path))
    if "\n" not in text and ": " in text and len(text) < 2**20:
        path.write_text(MINIMAL)
        with pytest.raises(JobError):
            load_job(path, [f"model={{{text}}}"])


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**31, {resource.RLIM_INFINITY}))
from raydist.job.load import load_job
from raydist.errors import JobError
path = {str(tmp_path / "job.yaml")!r}
for source in ("/dev/zero", path):
    open(path, "w").write({MINIMAL!r} + "strategy: {{name: zero, stage: 1, config: /dev/zero}}")
    try:
        load_job(source)
    except JobError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("/dev/zero has more than 1,048,576 bytes") == 2


def test_what_people_write_is_read(tmp_path: Path) -> None:
    nested = "[" * MOST_LEVELS + "]" * MOST_LEVELS
    assert parse_yaml(nested, yaml.SafeLoader)[0] == yaml.safe_load(nested)
    shared = "common: &c {path: a, text_column: t}\nboth: [*c, *c]\nmerged: {<<: *c, path: b}\n"
    value, lines = parse_yaml(shared, yaml.SafeLoader)
    assert value["merged"] == {"path": "b", "text_column": "t"} and lines[("both",)] == 2


def test_json_of_many_levels_is_refused() -> None:
    assert parse_json("[" * 40 + "]" * 40) == yaml.safe_load("[" * 40 + "]" * 40)
    for text in ("[" * 100_000, "[" * 42 + "]" * 42, '{"a":' * 60 + "1" + "}" * 60):
        with pytest.raises(ValueError, match=f"more than {MOST_LEVELS} levels"):
            parse_json(text)


@pytest.mark.parametrize(
    "number",
    [
        "train.lr=.inf", "train.max_steps=1" + "0" * 40, "train.max_grad_norm=.inf", "adapter.r=10000000000",
        "packing.block_size=1000000000000", "scaling.num_workers=10000000000", "train.weight_decay=.inf",
        "model.tokenizer.train.vocab_size=1000000000000", "train.gradient_checkpointing=10000000000000000000",
    ],
)  # fmt: skip
def test_numbers_that_no_machine_counts_to_are_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "job.yaml").write_text(MINIMAL)
    with pytest.raises(JobError, match=number.partition("=")[0]):
        load_job(tmp_path / "job.yaml", [number])
