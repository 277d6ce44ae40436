"""The run folder: whether a run may begin or resume in it, and its preparation."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.common.lock import WITHOUT_LOCKS, Lock
from dnal_dist.common.span import spanned
from dnal_dist.data import loader
from dnal_dist.distributed.context import Context
from dnal_dist.report import records

# What a run writes into its folder, and all that --overwrite removes from it. The last exists from start to end: a folder without
# it holds no run, whatever else is in it.
PRODUCTS = ("recipe.yaml", "checkpoints", "compact", "export", "evaluation", "report.html", "report.md", "plots")
PRODUCTS += ("wandb", "tensorboard", "mlflow", "metrics.jsonl")
# Seconds that a killed run may take to release its folder: its loader processes notice after a few.
LOCK_SECONDS = 60
# Keys that determine the tensors of a checkpoint.
FIXED = ("model.name", "model.num_classes", "model.width", "model.arguments", "model.ignore", "architecture.streams")
# The remedy where a run must not resume. A batch script takes no --overwrite: each requeue would start again.
REMEDY = "name another output=..., or remove the folder (outside of SLURM: --overwrite)"


class Opened(NamedTuple):
    """A run folder that is ready."""

    saved: Checkpoint | None
    """The checkpoint to resume from."""
    faults: list[str]
    """Warnings about damage."""
    changed: dict[str, list]
    """Keys of the recipe that changed since, with both values."""
    lock: Lock | None
    """Held by the main process until the run ends."""


def has_checkpoints(folder: Path) -> bool:
    """Whether the run folder has any, damaged or not: a run there is then resumed or refused, but does not begin."""
    try:
        return bool(checkpoint.found(folder / "checkpoints"))
    except (OSError, ValueError):
        return True  # open_folder reports why it cannot be read


def open_folder(folder: Path, settings: recipe.Recipe, context: Context, overwrite: bool, allowed: Sequence[str] = ()) -> Opened:
    """Make `folder` ready for a run of `settings`, to resume from its newest checkpoint or to begin. allowed: keys of the recipe
    that may have changed. The main process reads and writes first, so that all processes refuse the folder or none does. Raises
    InputError."""
    opened, refusal, path = Opened(None, [], {}, None), None, None
    try:
        if context.main:
            path, opened = _prepare(folder, settings, overwrite, allowed)
    except InputError as error:
        refusal = str(error)
    refusal, path = context.from_main((refusal, path))
    if refusal:
        raise InputError(refusal)
    if not context.main and path is not None:
        try:
            opened = opened._replace(saved=checkpoint.read(path))
        except (ValueError, OSError) as error:
            raise InputError(
                f"key 'output': process {context.rank} cannot read what process 0 does ({error}); name a folder that all "
                "machines share",
                local=True,
            ) from None
    return opened


def _prepare(folder: Path, settings: recipe.Recipe, overwrite: bool, allowed: Sequence[str]) -> tuple[Path | None, Opened]:
    lock = None
    try:
        _check_owned(folder, _products(folder))
        folder.mkdir(parents=True, exist_ok=True)
        lock, weaker = lock_folder(folder)
        # Listed after locking: the previous holder may have written until then.
        products = _products(folder)
        for unclean in (folder, folder / "checkpoints"):
            atomic.clean(unclean)
        path, saved, damaged, changed, faults = _decide(folder, products, settings, overwrite, allowed)
        if saved is not None:
            faults = [_set_aside(*one) for one in damaged.items()]
        if saved is None:
            for old in map(folder.joinpath, products):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        # First, since it marks the folder as a run's.
        (folder / PRODUCTS[-1]).touch()
        if saved is None:
            write_recipe(folder, settings)
    except Exception as error:
        if lock is not None:
            lock.release()
        if isinstance(error, InputError) or not isinstance(error, OSError | ValueError):
            raise
        why = reason(error).removeprefix(f"{folder}: ")
        raise InputError(f"key 'output': {folder} cannot be written ({why}); name another folder") from None
    return path, Opened(saved, [*weaker, *faults], changed, lock)


def inspect(folder: Path, settings: recipe.Recipe, overwrite: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a run of `settings` would resume from in `folder`, and its warnings. Nothing is written or locked. Raises
    InputError as open_folder does, OSError if the folder cannot be read."""
    products = _products(folder)
    _check_owned(folder, products)
    _, saved, _, _, faults = _decide(folder, products, settings, overwrite, ())
    return saved, faults


def _check_owned(folder: Path, products: list[str]) -> None:
    if products and PRODUCTS[-1] not in products:
        raise InputError(
            f"key 'output': {folder} holds {', '.join(products)}, but no {PRODUCTS[-1]}, so it may not be a run's; "
            f"name another folder, or remove what is in the way"
        )
    for path in (folder / "recipe.yaml", folder / "metrics.jsonl"):
        if os.path.exists(path) and not path.is_file() and not path.is_dir():
            raise InputError(f"key 'output': {path} is not a regular file; name another folder, or remove it")


class _Decision(NamedTuple):
    path: Path | None
    saved: Checkpoint | None
    damaged: dict[Path, str]
    changed: dict[str, list]
    faults: list[str]


def _decide(folder: Path, products: list[str], settings: recipe.Recipe, overwrite: bool, allowed: Sequence[str]) -> _Decision:
    """Whether a run resumes or begins. Writes nothing. Raises InputError."""
    path, saved, damaged = (None, None, {}) if overwrite else checkpoint.latest(folder / "checkpoints")
    changed, faults = {}, [*damaged.values()]
    if saved is not None:
        changed = _changed(folder, saved.state.recipe, settings, allowed, saved.state.phase == "done")
    elif faults:
        raise InputError(f"key 'output': {faults[0]}; none is left, so {REMEDY}")
    elif products and not overwrite:
        faults = _start_again(folder, products, settings, allowed)
    return _Decision(path, saved, damaged, changed, faults)


@spanned("recipe write")
def write_recipe(folder: Path, settings: recipe.Recipe) -> None:
    """Raises InputError. When a run resumes, this comes last: a resume that fails must not change the folder's recipe."""
    try:
        atomic.replace(folder / "recipe.yaml", recipe.dump(settings).encode())
    except OSError as error:
        raise InputError(f"key 'output': {folder} cannot be written ({reason(error)}); {remedy(error)}", local=True) from None


def private_temp(folder: Path, rank: int, world_size: int) -> None:
    """Give this process a temporary folder for the sockets of its loaders, always the same one for a run and rank, so that the next
    start of the run removes what a kill leaves."""
    head = f"dnal_dist-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}-"
    own = Path(loader.socket_folder(), f"{head}{rank}")
    for old in own.parent.glob(f"{head}*"):
        number = old.name.removeprefix(head)
        # Those of other ranks of this run are theirs.
        if number.isdecimal() and (int(number) == rank or int(number) >= world_size):
            shutil.rmtree(old, ignore_errors=True)
    try:
        own.mkdir(0o700)
    except OSError:
        return  # something else has that name
    loader.use_for_sockets(str(own))


def _products(folder: Path) -> list[str]:
    # lexists: --overwrite must remove broken links too.
    return [name for name in PRODUCTS if os.path.lexists(folder / name)]


def lock_folder(folder: Path) -> tuple[Lock | None, list[str]]:
    """The lock of the folder, and what is to be said about its file system."""
    try:
        return Lock(folder / ".lock", LOCK_SECONDS), []
    except TimeoutError:
        raise InputError(f"key 'output': another process trains in {folder}; wait for its end, or name another folder") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return None, [f"{folder}: its file system has no locks ({error.strerror}); see that only one run at a time trains there"]


def _start_again(folder: Path, products: list[str], settings: recipe.Recipe, allowed: Sequence[str]) -> list[str]:
    """The warning about a run that ended before its first checkpoint and starts again. Raises InputError if work would be lost."""
    if "compact" in products:
        raise InputError(f"key 'output': {folder} holds a run without a checkpoint to resume from; {REMEDY}")
    # The one at step 0 costs no work.
    if any(record.get("global_step") != 0 for record in _records(folder, "checkpoint")):
        raise InputError(
            f"key 'output': the checkpoints of {folder} are gone, or none could be written, but its metrics.jsonl names some (its "
            f"warnings say which); put them back, or make room, and {REMEDY}"
        )
    try:
        old = recipe.load(folder / "recipe.yaml")
    except InputError:
        old = settings  # it was cut off when it was written
    _changed(folder, old.model_dump(mode="json"), settings, allowed)
    return [f"{folder}: the run ended before its first checkpoint; it starts again"]


def _records(folder: Path, kind: str) -> list[dict]:
    """A run's records of a kind; none if nothing of metrics.jsonl can be read."""
    try:
        return records.load(folder).of(kind)
    except InputError:
        return []


def _set_aside(path: Path, fault: str) -> str:
    """Rename a damaged checkpoint, out of the way of later ones, and return the warning about it."""
    aside = path.with_name(f"damaged-{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    except OSError:
        return f"{fault}; it was skipped"
    return f"{fault}; it was skipped and renamed to {aside.name}"


def _changed(folder: Path, old: dict, settings: recipe.Recipe, allowed: Sequence[str], finished: bool = False) -> dict[str, list]:
    """Keys that have another value now, with both values. Raises InputError with the difference for keys that may not change."""
    with contextlib.suppress(ValueError):
        # A key that came with a later release had its default.
        old = recipe.Recipe.model_validate_json(json.dumps(old)).model_dump(mode="json")
    before, after = recipe.flat(old), recipe.flat(settings.model_dump(mode="json"))
    changed = {key: [before.get(key), after.get(key)] for key in before | after if before.get(key) != after.get(key)}
    free = recipe.free_keys("resume")
    changed = {key: values for key, values in changed.items() if not recipe.is_free(key, free)}
    if unused := [key for key in allowed if not any(recipe.is_free(other, {key}) for other in before | after)]:
        raise InputError(f"--allow-changed {unused[0]}: no such key in the recipe")
    # What can never change comes first: a key that is allowed would only lead to the next refusal.
    never = "a finished run" if finished else ", ".join(key for key in changed if key in FIXED)
    refused = [key for key in changed if never or not recipe.is_free(key, set(allowed))]
    if refused:
        diff = "".join(f"\n  - {key}: {changed[key][0]}\n  + {key}: {changed[key][1]}" for key in refused)
        allow = " ".join(f"--allow-changed {key}" for key in refused)
        options = f"--overwrite; {never} can never change" if never else f"{allow} or --overwrite"
        raise InputError(
            f"{folder}: the recipe has changed since the run began:{diff}\n"
            f"undo that, or name another output=..., or remove the folder (outside of SLURM: {options})"
        )
    return changed
