"""A project's folder P: the run in P/<name>; at its end the model in P itself and, if asked, on the hub.

P/<name>/    the run        P/tokens/    the token logs
P/*          the files of the run's model/ (or of the merged adapter), then training_params.json
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raydist import files
from raydist.autotrain.params import LLMTrainingParams, refusals, run_name
from raydist.cluster.connect import ray_address
from raydist.errors import JobError, RaydistError, RunError
from raydist.folder import RunFolder
from raydist.run.run import RunResult, run_job

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM

    from raydist.model.base import CausalModel

PARAMETERS = "training_params.json"


def train(config: LLMTrainingParams, *, address: str | None = None) -> CausalModel | PeftModelForCausalLM:
    """Run the job of `config` on this machine or on Ray's cluster at `address`; returns the trained model.

    It is a transformers model or, for an adapter that was not merged, a peft model. Raises a RaydistError.
    """
    from raydist.model.export import load_trained

    run(config, address=address)
    return load_trained(Path(config.project_name).expanduser())


def run(config: LLMTrainingParams, *, address: str | None = None) -> RunResult:
    """Run or resume the job, and put the model into P and, if asked, on the hub. Raises a RaydistError."""
    job = config.job(_problems(config))
    token = read_token(config.token) if config.push_to_hub else ""
    result = run_job(job, address=ray_address(address))
    folder = Path(config.project_name).expanduser()
    published = publish(RunFolder(result.folder), folder, config)
    if config.push_to_hub:
        push(folder, published, f"{config.username}/{result.folder.name}", token)
    return result


def _problems(config: LLMTrainingParams) -> Iterator[str]:
    """Problems of P and the environment, found before anything is computed."""
    wrong = refusals(config.given)
    if config.project_name is not None and not {"project_name", "resume_from_checkpoint"} & wrong.keys():
        folder = Path(config.project_name).expanduser()
        run = RunFolder(folder / run_name(folder))
        if why := _no_resume(config.resume_from_checkpoint, run):
            yield f"resume_from_checkpoint: {why}"
        if foreign := _foreign(folder, run):
            yield (
                f"project_name: {folder} has {', '.join(foreign)}: the run did not write them, and the"
                " model's files would replace them; move them, or choose another P"
            )
    if config.push_to_hub is True and "token" not in wrong:
        try:
            read_token(config.token)
        except RaydistError as error:
            yield f"token: {error.what}"
        if not {"username", "project_name"} & wrong.keys():
            yield from _no_repository(f"{config.username}/{run_name(Path(config.project_name or 'p'))}")


def _no_repository(name: str) -> Iterator[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        yield f"username: the hub does not accept the repository name {name}: {error}"


def _no_resume(asked: bool | str | None, run: RunFolder) -> str:
    """Why the run cannot be resumed as asked; "" if it can."""
    steps = run.committed_steps()
    if asked is False and steps:
        return f"{run.path} has a run at step {steps[-1]}; leave it out to go on, or remove that folder"
    if not isinstance(asked, str):
        return ""
    path = Path(asked).expanduser()
    newest = run.checkpoint(steps[-1]) if steps else run.path
    if steps and path.resolve() in [p.resolve() for p in (run.path, run.checkpoints, newest)]:
        return ""
    if not path.exists():
        return f"no folder {asked}"
    if path.name.startswith("checkpoint-") or (path / "trainer_state.json").exists():
        return f"{asked} is a checkpoint of transformers' Trainer; to train it further give --model {asked}"
    if not steps and path.resolve() in (run.path.resolve(), run.checkpoints.resolve()):
        return f"{asked} has no checkpoint yet; leave it out to start the run"
    if path.resolve().parent == run.checkpoints.resolve():
        return f"{asked} is not the newest checkpoint, {newest.name}; remove the newer ones to go on from it"
    return (
        f"{asked} does not belong to this project's run, {run.path}; to train its model further give --model"
    )


# --- the model in P -------------------------------------------------------------------------------


def publish(run: RunFolder, folder: Path, config: LLMTrainingParams) -> list[str]:
    """Link the final files into P and write the parameters last; returns the names of all.

    Raises RunError if P has a file of one of these names that the run did not write.
    """
    source = _merged(run) if config.merge_adapter else run.model
    if foreign := _foreign(folder, run, [p.name for p in source.iterdir()]):
        raise RunError(
            f"{folder} has {', '.join(foreign)}, which the run did not write", where=str(folder),
            why="the model's files would replace them", fix="move them away, and submit again",
        )  # fmt: skip
    names = sorted(path.name for path in source.iterdir())
    for path in folder.iterdir():
        if path.is_file() and path.name not in names and _is_ours(path, run):
            path.unlink()  # the adapter's, if it has been merged since, or the other way round
    for name in names:
        if not (folder / name).exists():
            _link(source / name, folder / name)
    files.write_json(folder / PARAMETERS, config.to_json())
    return [*names, PARAMETERS]


def _merged(run: RunFolder) -> Path:
    from raydist.model.export import merge_adapter

    return run.merged if run.merged.exists() else merge_adapter(run)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        with files.replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def _foreign(folder: Path, run: RunFolder, names: list[str] | None = None) -> list[str]:
    """Names of files in P that the model's files (`names`) would replace and that the run did not write."""
    from raydist.model.export import is_model_file

    entries = list(folder.iterdir()) if folder.is_dir() else []
    if names is None:  # not known yet: whatever is called like a file of a model
        clash = [p for p in entries if not p.is_dir() and (is_model_file(p.name) or p.name == PARAMETERS)]
    else:
        clash = [p for p in entries if p.name in names]
    return sorted(path.name for path in clash if not _is_ours(path, run))


def _is_ours(path: Path, run: RunFolder) -> bool:
    """Whether the run wrote this file of P: it is a link to one of the run's files, or has equal content."""
    if path.name == PARAMETERS or not path.exists():
        return path.name == PARAMETERS and run.job_file.exists()
    written = (run.model / path.name, run.merged / path.name)
    return any(p.exists() and (p.samefile(path) or filecmp.cmp(p, path, shallow=False)) for p in written)


# --- the hub --------------------------------------------------------------------------------------


def read_token(named: str) -> str:
    """The token in an environment variable, NAME or ${NAME}, or in a file. Messages never show it."""
    name = named.strip("${}")
    path = Path(named).expanduser()
    token = os.environ.get(name, "") or (path.read_text("utf-8", "replace") if path.is_file() else "")
    if token := token.strip():
        return token
    is_name = re.fullmatch(r"[A-Z_]+", name)
    shown = f"{name} is" if is_name else "the value (not shown: it may be the token itself) is"
    raise JobError(f"{shown} neither an environment variable nor a file that holds a token")


def push(folder: Path, names: list[str], repository: str, token: str) -> None:
    """Upload these files of P to a private repository, which is created if there is none."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi(token=token)
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)
    except Exception as error:  # noqa: BLE001 - errors of the hub or of its HTTP client, or OSError
        raise RunError(
            f"the model is in {folder}, and could not be uploaded to {repository}",
            why=str(error).replace(token, "(token)").strip(), fix="submit again: only the upload remains",
        ) from None  # fmt: skip
