"""The run folder: what may be done with the one a recipe names, and doing it."""

import contextlib
import hashlib
import json
import multiprocessing.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint
from dnal_dist.checkpoint.writer import UNWRITTEN
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.distributed.context import Context

# What a run writes into its folder, and all that --overwrite removes from it. The last is there from start to end: a folder
# without it holds no run, whatever else is in it.
PRODUCTS = ("recipe.yaml", "checkpoints", "compact", "report.html", "report.md", "plots", "wandb", "tensorboard", "metrics.jsonl")
# Seconds that a run which was killed may take to let go of its folder: its loaders notice after a few.
LOCK_SECONDS = 60
# What has no say in the result. Of shards it is what they hold that has, which is compared elsewhere (train.assemble).
FREE = ("output", "tracking.", "checkpoint.", "data.workers", "data.cache", "data.train", "data.val")
# What the tensors of a checkpoint depend on.
FIXED = ("model.name", "model.num_classes", "model.width")
# The remedy where a run is not to go on. A batch script takes no --overwrite: each requeue would begin anew.
ANEW = "name another output=..., or remove the folder (outside of SLURM: --overwrite)"


class Opened(NamedTuple):
    """A run folder that is ready."""

    saved: Checkpoint | None
    """What to go on from."""
    faults: list[str]
    """What was found damaged."""
    changed: dict[str, list]
    """Keys of the recipe that changed since, with both values."""
    lock: FileLock | None
    """Held as long as the run goes on; the main process's."""


def has_checkpoints(folder: Path) -> bool:
    """Whether the run folder has any, damaged or not: then a run there is gone on with or refused, but does not begin."""
    try:
        return bool(checkpoint.found(folder / "checkpoints"))
    except (OSError, ValueError):
        return True  # open_folder says why it cannot be looked at


def open_folder(folder: Path, settings: recipe.Recipe, context: Context, overwrite: bool, allowed: Sequence[str] = ()) -> Opened:
    """Make `folder` ready for a run of `settings`: to go on from its newest checkpoint, or to begin. allowed: keys of the recipe
    that may have changed. The main process looks and writes first, so that all processes refuse the folder or none does. Raises
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
        found = _found(folder)
        _refuse_strangers(folder, found)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        # Once more: whoever had it may have written since.
        found = _found(folder)
        for place in (folder, folder / "checkpoints"):
            atomic.clean(place)
        path, saved, damaged, changed, faults = _judged(folder, found, settings, overwrite, allowed)
        if saved is not None:
            faults = [_set_aside(*one) for one in damaged.items()]
        if saved is None:
            for old in map(folder.joinpath, found):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        # First, since it is what marks the folder as a run's.
        (folder / PRODUCTS[-1]).touch()
        if saved is None:
            write_recipe(folder, settings)
    except Exception as error:
        if lock is not None:
            lock.release()
        if isinstance(error, InputError) or not isinstance(error, OSError | ValueError):
            raise
        why = getattr(error, "strerror", None) or error
        raise InputError(f"key 'output': {folder} cannot be written ({why}); name another folder") from None
    return path, Opened(saved, faults, changed, lock)


def look(folder: Path, settings: recipe.Recipe, overwrite: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """What a run of `settings` would go on from in `folder`, and what it would find damaged or begin anew. Nothing is written, no
    lock is taken. Raises InputError as open_folder does, OSError if the folder cannot be looked at."""
    found = _found(folder)
    _refuse_strangers(folder, found)
    _, saved, _, _, faults = _judged(folder, found, settings, overwrite, ())
    return saved, faults


def _refuse_strangers(folder: Path, found: list[str]) -> None:
    if found and PRODUCTS[-1] not in found:
        raise InputError(
            f"key 'output': {folder} holds {', '.join(found)}, but no {PRODUCTS[-1]}, so it may be no run's; "
            f"name another folder, or remove what is in the way"
        )


class _Judged(NamedTuple):
    path: Path | None
    saved: Checkpoint | None
    damaged: dict[Path, str]
    changed: dict[str, list]
    faults: list[str]


def _judged(folder: Path, found: list[str], settings: recipe.Recipe, overwrite: bool, allowed: Sequence[str]) -> _Judged:
    """Whether a run goes on or begins. Only looks. Raises InputError."""
    path, saved, damaged = (None, None, {}) if overwrite else checkpoint.latest(folder / "checkpoints")
    changed, faults = {}, [*damaged.values()]
    if saved is not None:
        changed = _changed(folder, saved.state.recipe, settings, allowed)
        if changed and saved.state.phase == "done":
            raise InputError(
                f"{folder}: this run is finished, and nothing of {', '.join(changed)} can change any more; undo that, or name "
                "another output=..."
            )
    elif faults:
        raise InputError(f"key 'output': {faults[0]}; none is left, so {ANEW}")
    elif found and not overwrite:
        faults = _begin_anew(folder, found, settings, allowed)
    return _Judged(path, saved, damaged, changed, faults)


@spanned("recipe write")
def write_recipe(folder: Path, settings: recipe.Recipe) -> None:
    """Of a run that goes on, only when it is known that it does. Raises InputError."""
    try:
        atomic.replace(folder / "recipe.yaml", recipe.dump(settings).encode())
    except OSError as error:
        raise InputError(f"key 'output': {folder} cannot be written ({error.strerror}); make room", local=True) from None


def private_temp(folder: Path, rank: int, world_size: int) -> None:
    """Give this process a place of its own for the sockets of its loaders: always the same for a run, so that what a kill leaves is
    gone when the run goes on."""
    head = f"dnal_dist-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}-"
    place = Path(tempfile.gettempdir(), f"{head}{rank}")
    for old in place.parent.glob(f"{head}*"):
        number = old.name.removeprefix(head)
        # Those of other ranks of this run are theirs.
        if number.isdecimal() and (int(number) == rank or int(number) >= world_size):
            shutil.rmtree(old, ignore_errors=True)
    try:
        place.mkdir(0o700)
    except OSError:
        return  # something else has that name
    # Where multiprocessing looks before it makes one of any name; removed as that would be, after the sockets in it.
    multiprocessing.current_process()._config["tempdir"] = str(place)
    multiprocessing.util.Finalize(None, shutil.rmtree, (place, True), exitpriority=-100)


def _found(folder: Path) -> list[str]:
    # lexists: what --overwrite must not leave behind includes links that lead nowhere.
    return [name for name in PRODUCTS if os.path.lexists(folder / name)]


def _lock(folder: Path) -> FileLock | None:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise InputError(f"key 'output': another process trains in {folder}; wait for its end, or name another folder") from None
    except NotImplementedError:
        return None  # a file system without locks
    return lock


def _begin_anew(folder: Path, found: list[str], settings: recipe.Recipe, allowed: Sequence[str]) -> list[str]:
    """What to say of a run without a checkpoint, which begins anew. Raises InputError for one that is not to be lost."""
    if "compact" in found:
        raise InputError(f"key 'output': {folder} holds a run without a checkpoint to go on from; {ANEW}")
    told = _told(folder)
    # One that took more than a moment to come to.
    if any(r.get("kind") == "checkpoint" and r.get("global_step") != 0 for r in told):
        if _none_written(told):
            raise InputError(
                f"key 'output': none of the checkpoints of {folder} could be written, as the warnings of its metrics.jsonl tell; "
                f"make room, and {ANEW}"
            )
        raise InputError(
            f"key 'output': the checkpoints of {folder} are gone, though its metrics.jsonl tells of some; put them back, or {ANEW}"
        )
    try:
        old = recipe.load(folder / "recipe.yaml")
    except InputError:
        old = settings  # it was cut off when it was written
    _changed(folder, old.model_dump(mode="json"), settings, allowed)
    return [f"{folder}: the run ended before its first checkpoint; it begins anew"]


def _told(folder: Path) -> list[dict]:
    """The records that tell what became of checkpoints."""
    found = []
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open(errors="replace") as lines:
        for line in lines:
            if any(f'"kind": "{kind}"' in line for kind in ("start", "checkpoint", "warning")):
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def _none_written(told: list[dict]) -> bool:
    # Each record of a checkpoint tells the size of the one before, if that was written; what a run resumed from was written, too.
    written = any("bytes" in record or record.get("resumed") for record in told)
    return not written and any(UNWRITTEN in str(record.get("message")) for record in told)


def _set_aside(path: Path, fault: str) -> str:
    """What to say of a damaged checkpoint, which must not be in the way of those to come."""
    aside = path.with_name(f"damaged-{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    except OSError:
        return f"{fault}; it was passed over"
    return f"{fault}; it was passed over and is called {aside.name} now"


def _changed(folder: Path, old: dict, settings: recipe.Recipe, allowed: Sequence[str]) -> dict[str, list]:
    """Keys that have another value now, with both. Raises InputError, showing them, for those that are not allowed to."""
    with contextlib.suppress(ValueError):
        # A key that came with a later release had its default.
        old = recipe.Recipe.model_validate_json(json.dumps(old)).model_dump(mode="json")
    before, after = _flat(old), _flat(settings.model_dump(mode="json"))
    changed = {key: [before.get(key), after.get(key)] for key in before | after if before.get(key) != after.get(key)}
    changed = {key: values for key, values in changed.items() if not key.startswith(FREE)}
    if unused := [key for key in allowed if not any(_covers(key, other) for other in before | after)]:
        raise InputError(f"--allow-changed {unused[0]}: no such key in the recipe")
    refused = [key for key in changed if key in FIXED or not any(_covers(one, key) for one in allowed)]
    if refused:
        diff = "".join(f"\n  - {key}: {changed[key][0]}\n  + {key}: {changed[key][1]}" for key in refused)
        hint = " ".join(f"--allow-changed {key}" for key in refused if key not in FIXED)
        options = f"{hint} or --overwrite" if hint else "--overwrite"
        raise InputError(
            f"{folder}: the recipe has changed since the run began:{diff}\n"
            f"undo that, or name another output=..., or remove the folder (outside of SLURM: {options})"
        )
    return changed


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _flat(tree: dict, head: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return flat
