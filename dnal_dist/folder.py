"""The run folder: what may be done with the one a recipe names, and doing it."""

import os
import shutil
from pathlib import Path

from dnal_dist import checkpoint, recipe
from dnal_dist.parallel import Parallel
from dnal_dist.recipe import InputError

# What a run writes into its folder, and all that --overwrite removes from it. The last is there from start to end: a folder
# without it holds no run, whatever else is in it.
PRODUCTS = ("recipe.yaml", "checkpoints", "compact", "report.html", "wandb", "metrics.jsonl")


def has_checkpoints(folder: Path) -> bool:
    """Whether the run folder has any, damaged or not: then a run there is gone on with or refused, but does not begin."""
    try:
        return any(folder.glob("checkpoints/step-*"))
    except OSError:
        return False


def open_folder(folder: Path, settings: recipe.Recipe, parallel: Parallel, resume: bool, overwrite: bool):
    """The checkpoint to go on from, or None, and what was found damaged. The main process looks and writes first, so that all
    processes refuse the folder or none does."""
    saved, faults, refusal = None, [], None
    try:
        if parallel.main:
            saved, faults = _prepare(folder, settings, resume, overwrite)
    except InputError as error:
        refusal = str(error)
    refusal, step = parallel.from_main((refusal, None if saved is None else saved.state["global_step"]))
    if refusal:
        raise InputError(refusal)
    if not parallel.main and step is not None:
        saved, faults = checkpoint.latest(folder / "checkpoints")
        if saved is None or saved.state["global_step"] != step:
            raise InputError(
                f"key 'output': process {parallel.rank} does not find the checkpoint of step {step} in {folder}; name a folder "
                f"that all machines share",
                local=True,
            )
    return saved, faults


def _prepare(folder: Path, settings: recipe.Recipe, resume: bool, overwrite: bool):
    try:
        # lexists: what --overwrite must not leave behind includes links that lead nowhere.
        found = [name for name in PRODUCTS if os.path.lexists(folder / name)]
        saved, faults = checkpoint.latest(folder / "checkpoints") if resume else (None, [])
        if saved is not None:
            _same_recipe(folder, saved.state["recipe"], settings)
        elif found and PRODUCTS[-1] not in found:
            raise InputError(
                f"key 'output': {folder} holds {', '.join(found)}, but no {PRODUCTS[-1]}, so it may be no run's; "
                f"name another folder, or remove what is in the way"
            )
        elif faults:
            raise InputError(f"key 'output': {faults[0]}; none is left, so replace the run by --overwrite or name another folder")
        elif found and resume and "compact" not in found:
            _same_recipe(folder, recipe.load(folder / "recipe.yaml").model_dump(mode="json"), settings)
            faults = [f"{folder}: the run ended before its first checkpoint; it begins anew"]
        elif found and not overwrite:
            hint = "it has no checkpoint to resume from" if resume else "go on with it by --resume"
            raise InputError(
                f"key 'output': {folder} already holds another run; {hint}, or replace it by --overwrite, or name another folder"
            )
        if saved is None:
            for path in map(folder.joinpath, found):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        # First, since it is what marks the folder as a run's.
        (folder / "metrics.jsonl").touch()
        (folder / "recipe.yaml").write_text(recipe.dump(settings))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"key 'output': {folder} cannot be written ({why}); name another folder") from None
    return saved, faults


def _same_recipe(folder: Path, old: dict, settings: recipe.Recipe) -> None:
    new = settings.model_dump(mode="json")
    changed = [key for key in _flat(old) | _flat(new) if _flat(old).get(key) != _flat(new).get(key)]
    changed = [key for key in changed if key != "output" and not key.startswith(("tracking.", "data.workers", "data.cache"))]
    if changed:
        told = ", ".join(f"{key}: {_flat(old).get(key)} -> {_flat(new).get(key)}" for key in changed)
        raise InputError(f"{folder}: the recipe has changed since the run began ({told}); undo that, or use --overwrite")


def _flat(tree: dict, head: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return flat
