"""Checkpoints: a folder of safetensors and JSON that is complete or not there, and that no code is needed to read."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dnal_dist import compact
from dnal_dist.receipts import Receipt
from dnal_dist.recipe import InputError

# What tells where a run stands, beside its tensors.
POSITION = ("phase", "step", "global_step", "penalty_rests", "penalty_weight", "penalty_lag", "seconds")


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    """network.NAME, momentum.NAME (by parameter name), alpha, alpha_momentum; those that there are."""
    state: dict
    """Everything else, as JSON: position, records so far, compact architecture, recipe."""


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder`/step-N, N being the state's global_step: under another name first, renamed when all of it is on disk. The two
    newest stay."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.state['global_step']:08d}"
    unfinished = folder / f".{final.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file({k: t.detach().cpu().contiguous() for k, t in checkpoint.tensors.items()}, unfinished / "state.safetensors")
    digest = _digest(unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps({**checkpoint.state, "sha256": digest}, indent=1) + "\n")
    for path in (*unfinished.iterdir(), unfinished):
        _to_disk(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)
    _to_disk(folder)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, or None, and a line about each newer one that is not."""
    faults = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path), faults
        except ValueError as error:
            faults.append(f"{path}: checkpoint is damaged and was passed over ({error})")
    return None, faults


def read(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises ValueError, one line, if it is not whole."""
    try:
        state = json.loads((path / "state.json").read_text())
        if missing := {*POSITION, "records", "compact", "recipe", "sha256"} - state.keys():
            raise ValueError(f"state.json lacks {', '.join(sorted(missing))}")
        if _digest(path / "state.safetensors") != state["sha256"]:
            raise ValueError("its tensors are not the ones that were saved")
        return Checkpoint(load_file(path / "state.safetensors"), state)
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from None


def save(run) -> None:
    """Write a checkpoint of where a phases.Run stands; only the main process does. Raises InputError if it cannot be written."""
    if not run.parallel.main:
        return
    tensors = {f"network.{name}": tensor for name, tensor in run.network.state_dict().items()}
    tensors |= {f"momentum.{name}": tensor for name, tensor in run.momentum.items()}
    tensors["alpha"] = run.architecture.alpha
    state = run.architecture_optimizer.state.get(run.architecture.alpha, {})
    if state.get("momentum_buffer") is not None:
        tensors["alpha_momentum"] = state["momentum_buffer"]
    position = {key: getattr(run, key) for key in POSITION}
    small = None if run.small is None else compact.describe(run.small)
    # How many records there are by now tells a resumed run which to keep.
    facts = {"records": run.track.records, "compact": small, "recipe": run.recipe.model_dump(mode="json")}
    facts |= {"scaler": run.parallel.scaler.state_dict(), "receipt": run.receipt.packed()}
    folder = run.folder / "checkpoints"
    try:
        write(folder, Checkpoint(tensors, position | facts))
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder}: checkpoint cannot be written ({why}); make room, then go on with --resume", local=True
        ) from None


def restore(run, saved: Checkpoint) -> None:
    """Put a phases.Run where `saved` was."""
    tensors, state = saved
    if state["compact"] is not None:
        run.small = compact.build(state["compact"]).to(run.parallel.device)
        run.supernet.cpu()
    part = {kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)} for kind in ("network.", "momentum.")}
    run.network.load_state_dict(part["network."])
    run.momentum = part["momentum."]
    with torch.no_grad():
        run.architecture.alpha.copy_(tensors["alpha"])
    if "alpha_momentum" in tensors:
        buffer = tensors["alpha_momentum"].to(run.parallel.device)
        run.architecture_optimizer.state[run.architecture.alpha]["momentum_buffer"] = buffer
    for key in POSITION:
        setattr(run, key, state[key])
    if run.parallel.main and state.get("receipt"):
        # The other processes begin with nothing taken, however many there are now.
        run.receipt = Receipt.unpacked(state["receipt"])
    if state.get("scaler") and run.parallel.scaler.is_enabled():
        run.parallel.scaler.load_state_dict(state["scaler"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
