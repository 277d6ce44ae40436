"""Checkpoints: a folder of safetensors and JSON that is complete or not there, and that no code is needed to read.

    checkpoints/step-00000660-search/
      state.safetensors   network.NAME, momentum.NAME, alpha, alpha_momentum; ranks.*: what each process had of its own
      state.json          where the run stood, its recipe, its compact network, ...
      manifest.json       size and SHA-256 of the two

The same form on every backend and number of processes. The newest one is found by looking at what is there, never by a pointer.
"""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from dnal_dist.common import atomic
from dnal_dist.common.files import read_regular
from dnal_dist.common.phases import PHASES, Phase
from dnal_dist.common.span import spanned
from dnal_dist.recipe import Keep

FORMAT = 1
UNKNOWN = (-1, -1)
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Model(BaseModel):
    """Part of state.json. Aliases are its keys where they differ from the names in the code; they belong to the format."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, validate_by_name=True, serialize_by_alias=True)


class Usage(Model):
    """Resources that one phase has used so far, beside its wall time."""

    images: int = 0
    """Training images."""
    device_seconds: float = 0.0
    """Wall seconds times processes; their number may change at a resume."""
    energy_kwh: float | None = None
    """Sum over all devices; None if one of them reports none."""
    bytes_sent: int | None = None
    """Bytes that each process sent, set when the phase ends; None where nothing was sent or measured."""


class PendingMetrics(Model):
    """Training metrics since the last record of a phase; the sums themselves are tensors, one for each process."""

    summary: str
    bytes: dict[str, int]
    """Bytes that a step of each kind sends, as far as measured."""
    listening: int
    """Steps whose traffic is still to be measured."""
    seconds: float
    skipped: list[str]
    steps: dict[str, int] = {}
    """Steps of each kind taken on the present processes and backend."""
    sent: int | None = None
    """Bytes sent by the steps before those; None if unknown."""


class RunState(Model):
    """Where a run stands. This is state.json, the part of a checkpoint beside its tensors."""

    phase: Phase
    step: int = Field(ge=0)
    """Iterations of the phase that are done."""
    global_step: int = Field(ge=0)
    """Iterations of the run that are done; also the position in the stream of batches."""
    evaluated: int = -1
    """Global step of the last evaluation."""
    accuracy: float | None = None
    """Validation accuracy at exactly this step, if it was evaluated."""
    memory_format: str | None = None
    """Of images and activations; None in checkpoints of earlier releases, to which "auto" was contiguous on a CPU."""
    penalty_frozen: bool = Field(False, alias="penalty_rests")
    """Whether the collapse guard has switched the penalty off."""
    penalty_weight: float | None = None
    """Weight of the last architecture step of a search towards a budget."""
    penalty_lag: float = 0.0
    """State of the closed loop that drives it (search.controller)."""
    seconds: dict[str, float] = {}
    """Wall time of each phase so far."""
    usage: dict[str, Usage] = Field({}, alias="spent")
    """Other resources of each phase so far."""
    records: int = Field(0, ge=0)
    """Records in metrics.jsonl at this point."""
    mask: str | None = None
    """The keep mask, packed by nets.masks; set once the network is pruned."""
    latency_factor: float | None = None
    """The compact network's latency as measured over what the table predicts, where a latency budget was kept by measurement."""
    compact: list | None = None
    """Description of the compact network by nets.compact, likewise; the network's tensors are its own from then on."""
    receipt: dict | None = None
    """Receipt of the pass over the training set that is under way (data.receipts)."""
    skipped: Annotated[set[str], Field(strict=False), PlainSerializer(sorted)] = set()
    """Samples that could not be used and have been reported."""
    metrics: PendingMetrics | None = Field(None, alias="meter")
    scaler: dict = {}
    """State of the loss scaler under float16."""
    world_size: int = Field(1, ge=1)
    backend: str = "single"
    shards: dict[str, str] = {}
    """Digest of the shards of each set: a position in the stream means nothing over others."""
    teacher: str | None = None
    """Digest of the weights of a given teacher."""
    tracker_run: str | None = None
    """Name of the run in the tracker."""
    recipe: dict[str, Any] = {}


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    """On the CPU: network.NAME, momentum.NAME and average.NAME (by parameter name), alpha, alpha_momentum, ranks.WHAT; those that
    there are."""
    state: RunState


def name(state: RunState) -> str:
    return f"step-{state.global_step:08d}-{state.phase}"


def write(folder: Path, checkpoint: Checkpoint, keep: Keep) -> int:
    """Write `folder`/step-N-PHASE, read it again, and only then remove those that are neither among the last nor the best. Returns
    its size in bytes. Raises OSError if it cannot be written or is not what was written, ValueError if it holds what is no number;
    all others stay then as they are."""
    if broken := next((k for k, t in checkpoint.tensors.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise ValueError(f"{broken} holds what is no number")
    contents = {
        TENSORS: save({key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}),
        STATE: (checkpoint.state.model_dump_json(indent=1) + "\n").encode(),
    }
    facts = {"format": FORMAT, "accuracy": checkpoint.state.accuracy, "files": {k: described(c) for k, c in contents.items()}}
    # Only this one: a run folder that is gone does not come back by that.
    folder.mkdir(exist_ok=True)
    final = folder / name(checkpoint.state)
    with atomic.folder(final) as unfinished:
        for file, content in contents.items():
            atomic.write(unfinished / file, content)
        for file, told in facts["files"].items():
            # What the disk has, not what memory remembers of it.
            _forget(unfinished / file)
            if described((unfinished / file).read_bytes()) != told:
                raise OSError(errno.EIO, "what was read back is not what was written", str(unfinished / file))
        atomic.write(unfinished / MANIFEST, (json.dumps(facts, indent=1) + "\n").encode())
    with contextlib.suppress(OSError):
        # The new one is there; the next save tries again.
        remove_old(folder, keep)
    return sum(map(len, contents.values()))


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, whole or not; last what has another form of name. Raises OSError if it cannot be
    looked at: that is not the same as none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if name.startswith("step-")), key=place, reverse=True)


def latest(folder: Path) -> tuple[Path | None, Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint in `folder` that is whole and where it lies, or None; and what is wrong with each newer one."""
    damaged = {}
    for path in found(folder):
        try:
            return path, read(path), damaged
        except ValueError as error:
            damaged[path] = str(error)
    return None, None, damaged


@spanned("checkpoint read")
def read(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises ValueError, naming it, if it is not whole, and OSError or MemoryError if that
    cannot be known. Nothing in it is ever run."""
    try:
        told = json.loads(read_regular(path / MANIFEST, 1 << 20))
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r:.40}, this release reads {FORMAT}")
        contents = {}
        for file in (TENSORS, STATE):
            contents[file] = read_regular(path / file, told["files"][file]["bytes"])
            if described(contents[file]) != told["files"][file]:
                raise ValueError(f"{file} is not what was saved")
        # The library gives them in another order on each process.
        return Checkpoint(dict(sorted(load(contents[TENSORS]).items())), RunState.model_validate_json(contents[STATE]))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{STATE}: key '{'.'.join(map(str, first['loc']))}': {first['msg']}"
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            raise
        # Whatever may be in there: cut JSON, a number where a list is due, a header of any kind.
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise ValueError(f"{path}: checkpoint is damaged ({why})")


def remove_old(folder: Path, keep: Keep) -> None:
    """Remove all but the last ones, those of the highest accuracy of the newest phase that has any, and that of pretrain's end."""
    paths = found(folder)
    pretrained = after_pretrain(folder)
    accuracies = {path: accuracy for path in paths if (accuracy := _accuracy(path)) is not None}
    newest = next((place(path)[1] for path in accuracies), None)
    baselines = [path for path in accuracies if place(path)[1] == newest]
    best = sorted(baselines, key=lambda path: (-accuracies[path], baselines.index(path)))[: keep.best]
    for path in paths[keep.last :]:
        if path not in best and path != pretrained and place(path) != UNKNOWN:
            atomic.remove(path)


def after_pretrain(folder: Path) -> Path | None:
    """The first checkpoint of the search in `folder`: the network as pretrain left it, if that could be written. Raises OSError."""
    return next((path for path in reversed(found(folder)) if place(path)[1] == PHASES.index("search")), None)


def place(path: Path) -> tuple[int, int]:
    """(global step, number of the phase in PHASES) of a checkpoint, from its folder's name; UNKNOWN if it has another form."""
    _, step, phase, *more = [*path.name.split("-"), ""]
    return (int(step), PHASES.index(phase)) if step.isdecimal() and phase in PHASES and more == [""] else UNKNOWN


def _accuracy(path: Path) -> float | None:
    try:
        accuracy = json.loads(read_regular(path / MANIFEST, 1 << 20))["accuracy"]
        return float(accuracy) if accuracy is not None else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def described(content: bytes) -> dict:
    """What the manifest says of a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _forget(path: Path) -> None:
    """Have the file read from disk the next time."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
