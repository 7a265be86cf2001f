"""A project's folder P: the run in P/<name>, and at its end the model in P itself, and on the hub.

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
from typing import Any

from raydist import files
from raydist.autotrain.params import LLMTrainingParams, refusals, run_name
from raydist.cluster.connect import ray_address
from raydist.errors import JobError, RaydistError, RunError
from raydist.folder import RunFolder
from raydist.run.run import RunResult, run_job

PARAMETERS = "training_params.json"


def train(config: LLMTrainingParams, *, address: str | None = None) -> Any:
    """Run the job of `config` here, or on Ray's cluster at `address`, and return the trained model.

    It is transformers' or, for an adapter that was not merged, peft's. Raises a RaydistError.
    """
    from raydist.model.export import load_trained

    run(config, address=address)
    return load_trained(Path(config.project_name).expanduser())


def run(config: LLMTrainingParams, *, address: str | None = None) -> RunResult:
    """Run the job, or go on with it; then P has the model, and the hub if asked. Raises a RaydistError."""
    job = config.job(_problems(config))
    token = read_token(config.token) if config.push_to_hub else ""
    result = run_job(job, address=ray_address(address))
    folder = Path(config.project_name).expanduser()
    published = publish(RunFolder(result.folder), folder, config)
    if config.push_to_hub:
        push(folder, published, f"{config.username}/{result.folder.name}", token)
    return result


def _problems(config: LLMTrainingParams) -> Iterator[str]:
    """What P and the environment do not allow, each as a text, before anything is spent."""
    wrong = refusals(config.given)
    if config.project_name is not None and not {"project_name", "resume_from_checkpoint"} & wrong.keys():
        folder = Path(config.project_name).expanduser()
        run = RunFolder(folder / run_name(folder))
        if why := _no_resume(config.resume_from_checkpoint, run):
            yield f"resume_from_checkpoint: {why}"
        if foreign := _foreign(folder, run):
            why = "P would get files of these names, and they are not its run's"
            yield f"project_name: {folder} has {', '.join(foreign)}: {why}; move them, or choose another P"
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
        yield f"username: the hub takes no repository {name}: {error}"


def _no_resume(asked: bool | str | None, run: RunFolder) -> str:
    """Why the run cannot go on as asked; "" if it can."""
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
        return f"{asked} is a checkpoint of transformers' Trainer; its weights go on as --model {asked}"
    if not steps and path.resolve() in (run.path.resolve(), run.checkpoints.resolve()):
        return f"{asked} has no checkpoint yet; leave it out, and the run begins"
    if path.resolve().parent == run.checkpoints.resolve():
        return f"{asked} is not the newest checkpoint, {newest.name}; remove the newer ones to go on from it"
    return f"{asked} is not of this project's run, {run.path}; give its model as --model to go on from that"


# --- the model in P -------------------------------------------------------------------------------


def publish(run: RunFolder, folder: Path, config: LLMTrainingParams) -> list[str]:
    """Link the final files into P and write the parameters last; their names.

    A rerun finds them there. Raises RunError for a file of the same name that is not the run's.
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
            path.unlink()  # of the adapter before it was merged, or the other way round
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
    """Files in P that a model's would replace (those called `names`) and that the run did not write."""
    from raydist.model.export import is_model_file

    found = list(folder.iterdir()) if folder.is_dir() else []
    if names is None:
        found = [p for p in found if not p.is_dir() and (is_model_file(p.name) or p.name == PARAMETERS)]
    clash = [path for path in found if names is None or path.name in names]
    return sorted(path.name for path in clash if not _is_ours(path, run))


def _is_ours(path: Path, run: RunFolder) -> bool:
    if path.name == PARAMETERS or not path.exists():
        return path.name == PARAMETERS and run.job_file.exists()
    written = (run.model / path.name, run.merged / path.name)
    return any(p.exists() and (p.samefile(path) or filecmp.cmp(p, path, shallow=False)) for p in written)


# --- the hub --------------------------------------------------------------------------------------


def read_token(named: str) -> str:
    """The content of an environment variable, NAME or ${NAME}, or of a file; never shown."""
    name = named.strip("${}")
    path = Path(named).expanduser()
    token = os.environ.get(name, "") or (path.read_text("utf-8", "replace") if path.is_file() else "")
    if token := token.strip():
        return token
    plainly_a_name = re.fullmatch(r"[A-Z_]+", name)
    shown = f"{name} is" if plainly_a_name else "what is given (not shown: it may be the token itself) is"
    raise JobError(f"{shown} neither an environment variable nor a file that holds a token")


def push(folder: Path, names: list[str], repository: str, token: str) -> None:
    """Upload these files of P to a private repository, made where there is none."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi(token=token)
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)
    except Exception as error:  # noqa: BLE001 - the hub's own, those of its HTTP client, or OSError
        raise RunError(
            f"the model is in {folder}, and could not be uploaded to {repository}",
            why=str(error).replace(token, "(token)").strip(), fix="submit again: only the upload is left",
        ) from None  # fmt: skip
