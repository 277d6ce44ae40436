"""A checkpoint is whole or not there, and nothing that may lie in its place does harm."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from runs import at
from safetensors.torch import save

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint, RunState
from dnal_dist.common import atomic
from dnal_dist.recipe import Keep


def made(step: int, phase: str = "pretrain", accuracy: float | None = None) -> Checkpoint:
    tensors = {
        "alpha": torch.full((50,), float(step)),
        "network.a": torch.randn(3, 4),
        "ranks.random": torch.zeros(2, 5, dtype=torch.uint8),
    }
    return Checkpoint(tensors, RunState(phase=phase, step=step, global_step=step, accuracy=accuracy, recipe={"seed": 1}, records=7))


def write(folder: Path, *checkpoints: Checkpoint, last: int = 2, best: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    for one in checkpoints:
        checkpoint.write(folder, one, Keep(last=last, best=best))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.state == b.state and a.tensors.keys() == b.tensors.keys() and all(a.tensors[k].equal(b.tensors[k]) for k in a.tensors)


def test_a_written_checkpoint_is_read(tmp_path):
    ours = made(12)
    write(tmp_path, ours)
    path, found, damaged = checkpoint.latest(tmp_path)
    assert (path.name, damaged) == ("step-00000012-pretrain", {})
    assert found.state == ours.state
    assert all(
        torch.equal(found.tensors[key], tensor) and found.tensors[key].dtype == tensor.dtype for key, tensor in ours.tensors.items()
    )
    # Readable without this project.
    assert json.loads((path / "state.json").read_text())["recipe"] == {"seed": 1}
    assert names(path) == ["manifest.json", "state.json", "state.safetensors"]


def test_the_order_is_that_of_the_run_and_not_of_the_names(tmp_path):
    write(tmp_path, *[made(8, phase) for phase in ("finetune", "prune", "search")], made(5, "finetune"), last=9)
    assert [path.name for path in checkpoint.found(tmp_path)] == [
        "step-00000008-finetune", "step-00000008-prune", "step-00000008-search", "step-00000005-finetune",
    ]  # fmt: skip


def test_the_last_the_best_of_the_newest_phase_and_pretrains_end_stay(tmp_path):
    cases = [
        (1, "pretrain", 0.99),
        (2, "search", 0.7),
        (3, "search", 0.9),
        (4, "search", None),
        (5, "search", 0.8),
        (6, "search", 0.9),
    ]
    kept = []
    for step, phase, accuracy in cases:
        write(tmp_path, made(step, phase, accuracy), last=1, best=1)
        kept.append([int(name.split("-")[1]) for name in names(tmp_path)])
    # Of two equal ones the later.
    # Pretrain's end is where the search begins.
    assert kept == [[1], [2], [2, 3], [2, 3, 4], [2, 3, 5], [2, 6]]
    write(tmp_path, made(7, "finetune"), made(8, "finetune", 0.1), made(9, "finetune", 0.2), last=2, best=1)
    assert [int(name.split("-")[1]) for name in names(tmp_path)] == [2, 8, 9]


def test_none_is_removed_before_the_new_one_is_there(tmp_path):
    write(tmp_path, made(1), made(2))
    with at("write", after=lambda _, file: os.truncate(file[0], 10)), pytest.raises(OSError, match="read back"):
        write(tmp_path, made(3), last=1)
    assert names(tmp_path) == ["step-00000001-pretrain", "step-00000002-pretrain"]


# Each with how often a save comes there at least.
OPERATIONS = {"write": 3, "to_disk": 5, "rename": 1, "remove": 1, "shutil.rmtree": 2}
MOMENTS = [(operation, when) for operation in OPERATIONS for when in ("before", "after")]


class Crash(BaseException):
    """As if the process were killed."""


def failing_at(patch, operation: str, number: int, when: str, error: type) -> None:
    """`error` at the `number`-th call of an operation: before it is done, halfway or afterwards."""
    holder, _, attribute = operation.rpartition(".")
    holder = getattr(atomic, holder) if holder else atomic
    original, calls = getattr(holder, attribute), iter(range(100))

    def failing(path, *more, **options):
        fails = next(calls) == number
        if not fails or when == "after":
            original(path, *more, **options)
        if fails and when == "half" and operation == "write":
            path.write_bytes(more[0][: len(more[0]) // 2])
        if fails and when == "half" and operation == "shutil.rmtree" and path.exists():
            next(path.iterdir()).unlink()
        if fails:
            raise error

    patch.setattr(holder, attribute, failing)


def write_failing(folder: Path, new: Checkpoint, error: type, *where, **kept) -> bool:
    """Whether the write came to the place where it is to fail."""
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, *where, error)
        try:
            write(folder, new, **kept)
        except error:
            return True
    return False


@pytest.mark.parametrize("operation, when", [*MOMENTS, ("write", "half"), ("shutil.rmtree", "half")])
def test_a_kill_within_a_save_leaves_the_newest_whole_checkpoint(tmp_path, operation, when):
    """At each call of each operation that touches the disk: what is found is the one before or the new one, and whole."""
    older, newest, number = made(1), made(2), 0
    write(tmp_path / "0", older, last=1)
    while write_failing(folder := tmp_path / f"{number}", newest, Crash, operation, number, when, last=1):
        _, found, damaged = checkpoint.latest(folder)
        assert not damaged and (same(found, newest) or same(found, older))
        atomic.clean(folder)
        write(folder, newest, last=1)
        assert same(checkpoint.latest(folder)[1], newest) and names(folder) == ["step-00000002-pretrain"]
        number += 1
        write(tmp_path / f"{number}", older, last=1)
    assert number >= OPERATIONS[operation]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path, made(1))
    monkeypatch.setattr(atomic, "to_disk", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, made(2))
    assert names(tmp_path) == ["step-00000001-pretrain"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["write", "to_disk", "rename", "os.rename", "shutil.rmtree"])
@pytest.mark.parametrize("error", [Crash, OSError])
def test_one_of_the_same_name_is_replaced_and_never_lost(tmp_path, operation, when, error):
    """The only one there is: after a stop within an evaluation, the epoch's end is at the same step."""
    first, second, number = made(3), made(3), 0
    write(tmp_path / "0", first)
    while write_failing(folder := tmp_path / f"{number}", second, error, operation, number, when, last=1, best=0):
        atomic.clean(folder)
        assert names(folder) == ["step-00000003-pretrain"]
        assert any(same(checkpoint.latest(folder)[1], one) for one in (first, second))
        number += 1
        write(tmp_path / f"{number}", first)
    assert number > 0 and same(checkpoint.latest(folder)[1], second) and names(folder) == ["step-00000003-pretrain"]


def rewritten(path: Path, **changes) -> None:
    """With a manifest that fits: whoever wants to harm can make one."""
    content = (path / "state.json").read_bytes() if "state" not in changes else changes["state"]
    tensors = (path / "state.safetensors").read_bytes() if "tensors" not in changes else changes["tensors"]
    (path / "state.json").write_bytes(content)
    (path / "state.safetensors").write_bytes(tensors)
    files = {"state.json": checkpoint.described(content), "state.safetensors": checkpoint.described(tensors)}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "accuracy": None, "files": files}))


def altered(**changes) -> bytes:
    return json.dumps({**made(2).state.model_dump(), **changes}).encode()


HOSTILE = {
    "cut tensors": lambda path: os.truncate(path / "state.safetensors", 100),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "cut state": lambda path: os.truncate(path / "state.json", 20),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "list for a manifest": lambda path: (path / "manifest.json").write_text("[]"),
    "deep manifest": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "another format": lambda path: (path / "manifest.json").write_text('{"format": 2}'),
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
    "a link to nowhere": lambda path: (shutil.rmtree(path), path.symlink_to("/nowhere/at/all")),
    "tensors that are none": lambda path: rewritten(path, tensors=b"\x80\x04\x95" + b"c" * 500),
    "a header without end": lambda path: rewritten(path, tensors=(2**62).to_bytes(8, "little") + b"{}"),
    "tensors beyond the file": lambda path: rewritten(
        path, tensors=save({"a": torch.zeros(4)}).replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,99]')
    ),
    "a deep state": lambda path: rewritten(path, state=b"[" * 100_000),
    "a state of another kind": lambda path: rewritten(path, state=b"[]"),
    "an unknown phase": lambda path: rewritten(path, state=altered(phase="../../etc")),
    "a step below 0": lambda path: rewritten(path, state=altered(step=-1)),
    "a step that is text": lambda path: rewritten(path, state=altered(global_step="2")),
    "a pipe": lambda path: ((path / "state.json").unlink(), os.mkfifo(path / "state.json")),
    "a device": lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").symlink_to("/dev/zero")),
    "a size that is text": lambda path: (path / "manifest.json").write_text(
        '{"format": 1, "files": {"state.safetensors": {"bytes": "many"}}}'
    ),
    "an unknown key": lambda path: rewritten(path, state=altered(run="rm -rf /")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_read(tmp_path, kind):
    older = made(1)
    write(tmp_path, older, made(2))
    path = tmp_path / "step-00000002-pretrain"
    HOSTILE[kind](path)
    where, found, damaged = checkpoint.latest(tmp_path)
    assert same(found, older) and where.name == "step-00000001-pretrain"
    (fault,) = damaged.values()
    assert fault.startswith(f"{path}: checkpoint is damaged (") and "\n" not in fault


def test_no_state_breaks_the_reader(tmp_path):
    """States with random values in random places, under a manifest that fits, are read or refused, and never anything else."""
    draw, seen = random.Random(3), set()
    write(tmp_path, made(2))
    path = tmp_path / "step-00000002-pretrain"
    whole = json.loads((path / "state.json").read_bytes())
    odd = [None, -1, 1 << 70, 1.5, float("nan"), "x", "", [], {}, [[]], {"a": {}}, True, "\ud800", "done"]
    for _ in range(200):
        tree = dict(whole)
        for key in draw.sample(sorted(tree), 2):
            tree[key] = draw.choice(odd)
        rewritten(path, state=json.dumps(tree).encode())
        try:
            seen.add(type(checkpoint.read(path)))
        except ValueError as error:
            seen.add(ValueError)
            assert str(error).startswith(f"{path}: checkpoint is damaged (") and "\n" not in str(error)
    assert seen == {checkpoint.Checkpoint, ValueError}


def test_random_damage_is_always_noticed(tmp_path):
    generator = random.Random(0)
    write(tmp_path, made(1), made(2))
    path = tmp_path / "step-00000002-pretrain"
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    for _ in range(300):
        name = generator.choice(list(whole))
        content = bytearray(whole[name])
        place = generator.randrange(len(content))
        if generator.random() < 0.5:
            content[place] ^= 1 << generator.randrange(8)
        else:
            del content[place : place + generator.randrange(1, 200)]
        (path / name).write_bytes(content)
        where, found, damaged = checkpoint.latest(tmp_path)
        if name == "manifest.json" and where == path:
            # Blanks, or the accuracy that stands there twice, may change without harm; never what the files are.
            assert json.loads(content)["files"] == json.loads(whole[name])["files"]
            assert found.state == made(2).state
        else:
            assert where.name == "step-00000001-pretrain" and list(damaged) == [path]
        (path / name).write_bytes(whole[name])


def test_checkpoints_of_another_form_are_not_removed(tmp_path):
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-00000099" / "state.json").write_text("{}")
    assert checkpoint.latest(tmp_path)[:2] == (None, None) and len(checkpoint.latest(tmp_path)[2]) == 1
    write(tmp_path, made(1), made(2), made(3), last=1)
    assert names(tmp_path) == ["step-00000003-pretrain", "step-00000099"]
