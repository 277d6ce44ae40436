"""A checkpoint that is damaged, gone or cannot be written; records likewise: the run goes on, and nothing good is lost."""

import itertools
import json
import os
import re
import shutil
import time

import pytest
from runs import SHORT, Killed, arguments, at, flip, killed, records, tensors, training_records

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.distributed.ddp import Replicated
from dnal_dist.tracking import run_log
from dnal_dist.training import state as training_state
from dnal_dist.training import stopping

DAMAGE = {
    "tensors altered": lambda step: flip(step / "state.safetensors"),
    "position cut short": lambda step: os.truncate(step / "state.json", 100),
    "nothing": lambda step: [path.unlink() for path in step.iterdir()],
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(train_here, short, digits, fault):
    """The newest one is the run's end, the one before the end of its search and pruning."""
    whole, weights = training_records(short), tensors(short)
    newest, before, _ = checkpoint.found(short / "checkpoints")
    assert (before.name, newest.name) == ("step-00000008-finetune", "step-00000012-done")
    DAMAGE[fault](newest)
    ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 0, ended.err
    assert f"warning: {newest}: checkpoint is damaged (" in ended.out
    assert "; it was skipped and renamed to damaged-step-00000012-done" in ended.out
    assert "resumed in finetune after 0 steps (8 in all)" in ended.out
    assert training_records(short) == whole and tensors(short) == weights
    assert checkpoint.latest(short / "checkpoints")[2] == {}


def full_disk(of):
    """Meanwhile the disk is full for checkpoints whose number is in `of`."""
    count = itertools.count()

    def full(_, file):
        if file[0].name == checkpoint.TENSORS and next(count) in of:
            raise OSError(28, "No space left on device")

    return at("write", before=full)


def test_training_goes_on_where_a_checkpoint_cannot_be_written(train_here, short, digits, tmp_path):
    run = tmp_path / "run"
    with full_disk({1, 2}):
        ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    warnings = [r["message"] for r in records(run, "warning")]
    told_of = (
        f"{run}/checkpoints: checkpoint cannot be written (No space left on device); the last good one is of step 0, 0 minutes old"
    )
    assert [w for w in warnings if "cannot be written" in w] == [
        f"{told_of}. Training goes on and the next save tries again: make room"
    ] * 2
    assert training_records(run) == training_records(short) and tensors(run) == tensors(short)
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step-00000012-done", "step-00000008-finetune"]


def test_a_disk_that_never_has_room_stops_the_run_after_a_while(train_here, digits, tmp_path):
    run = tmp_path / "run"
    with full_disk(range(1, 1000)):
        ended = train_here(*arguments(digits, run, *SHORT, "checkpoint.give_up_hours=1e-9"))
    assert ended.code == 2
    assert re.match(
        rf"error: {run}/checkpoints: checkpoint cannot be written \(No space left on device\), and the last good one is 0 minutes "
        r"old, more than checkpoint\.give_up_hours=1e-09 allows; make room, then use the same command again$",
        ended.err.strip(),
    ), ended.err


def test_a_last_checkpoint_is_tried_again(train_here, digits, tmp_path, monkeypatch):
    """A stop is the last chance to save; the room may come back within a moment."""
    run = tmp_path / "run"
    monkeypatch.setattr("dnal_dist.checkpoint.writer.BETWEEN", 0.01)
    with full_disk({1, 2}):
        ended = train_here(*arguments(digits, run, *SHORT), "--max-time=1s")
    assert ended.code == stopping.STOPPED and "; the same command goes on from here" in ended.err
    assert checkpoint.latest(run / "checkpoints")[1].state.global_step == 1
    with full_disk(range(1000)):
        ended = train_here(*arguments(digits, run, *SHORT), "--max-time=1s")
    assert ended.code == stopping.STOPPED and "; the same command goes on from step-00000001-pretrain" in ended.err


def test_a_folder_of_checkpoints_that_vanishes_is_made_again(train_here, short, digits, tmp_path):
    run = tmp_path / "run"
    with at("checkpoint", before=lambda number, _: shutil.rmtree(run / "checkpoints") if number == 1 else None):
        assert train_here(*arguments(digits, run, *SHORT)).code == 0
    assert training_records(run) == training_records(short) and checkpoint.latest(run / "checkpoints")[1].state.phase == "done"


def test_a_run_folder_that_is_removed_ends_the_run(train_here, digits, tmp_path):
    run = tmp_path / "run"
    with at("checkpoint", before=lambda number, _: shutil.rmtree(run) if number == 1 else None):
        ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 2 and not run.exists()
    assert ended.err.startswith(f"error: key 'output': {run} was removed while the run trained in it, "), ended.err


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(train_here, short, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("dnal_dist.checkpoint.writer.BETWEEN", 0.01)
    # The fifth is that of the end.
    with full_disk(range(4, 1000)):
        ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 2 and "its last checkpoint cannot be written (see the warnings above)" in ended.err
    assert not records(run, "end")
    assert train_here(*arguments(digits, run, *SHORT)).code == 0
    assert training_records(run) == training_records(short) and tensors(run) == tensors(short)


def test_records_wait_for_room(train_here, short, digits, tmp_path, monkeypatch):
    """Nothing is lost, and no checkpoint counts on records that are not there."""
    run, flush, count = tmp_path / "run", run_log.RunLog.flush, iter(range(10_000))

    def full(self):
        if 5 < next(count) < 20:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(run_log.RunLog, "flush", full)
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    assert "metrics.jsonl: cannot be written (No space left on device); training goes on, make room" in ended.out
    assert training_records(run) == training_records(short)


def test_a_pause_is_measured_and_recorded(train_here, digits, tmp_path, monkeypatch):
    """With the gathering of what several processes share out."""
    gathered, take = Replicated.gathered, training_state.take

    def slow(self):
        time.sleep(0.2)
        return gathered(self)

    monkeypatch.setattr(Replicated, "gathered", slow)
    monkeypatch.setattr(training_state, "take", lambda *given: time.sleep(0.1) or take(*given))
    assert train_here(*arguments(digits, tmp_path / "run", *SHORT, "checkpoint.every_steps=2")).code == 0
    found = records(tmp_path / "run", "checkpoint")
    assert [r["step"] for r in found] == [0, 2, 0, 2, 0, 0, 2, 0]
    # In the midst of a phase for both; at its ends what is gathered is there.
    assert all(r["pause_seconds"] >= (0.3 if r["step"] else 0.1) for r in found)
    assert "bytes" not in found[0] and all(r["bytes"] > 10_000 and r["write_seconds"] > 0 for r in found[1:])


def test_no_whole_checkpoint_is_left(train_here, short, digits):
    for step in (short / "checkpoints").glob("step-*"):
        flip(step / "state.safetensors")
    before = (short / "metrics.jsonl").read_bytes()
    ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "step-00000012-done: checkpoint is damaged" in line and "--overwrite" in line
    assert (short / "metrics.jsonl").read_bytes() == before


def test_a_result_without_a_checkpoint_is_not_thrown_away(train_here, short, digits):
    shutil.rmtree(short / "checkpoints")
    ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 2
    assert ended.err.startswith(
        f"error: key 'output': {short} holds a run without a checkpoint to resume from; name another output="
    )
    assert tensors(short)


def test_a_run_none_of_whose_checkpoints_could_be_written_is_refused(train_here, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("dnal_dist.checkpoint.writer.BETWEEN", 0.01)
    with full_disk(range(1000)):
        ended = train_here(*arguments(digits, run, *SHORT, "phases.pretrain.steps=3"), "--max-time=1s")
    assert ended.code == stopping.STOPPED, ended.err
    before = (run / "metrics.jsonl").read_bytes()
    ended = train_here(*arguments(digits, run, *SHORT, "phases.pretrain.steps=3"))
    assert ended.code == 2 and (run / "metrics.jsonl").read_bytes() == before
    (line,) = ended.err.splitlines()
    assert f"the checkpoints of {run} are gone, or none could be written" in line and "or make room, and " in line


def test_missing_checkpoints_are_refused_before_a_run_starts_again(train_here, digits, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        assert train_here(*arguments(digits, run, *SHORT), "--max-time=1s").code == stopping.STOPPED
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 2 and ended.err.startswith(
        f"error: key 'output': the checkpoints of {run} are gone, or none could be written, but its metrics.jsonl names some"
    )
    assert (run / "metrics.jsonl").read_bytes() == before
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert train_here(*arguments(digits, run, *SHORT)).code == 0


@pytest.mark.parametrize("what", ["listdir", "read_regular"])
def test_a_disk_that_does_not_answer_is_not_taken_for_an_empty_one(train_here, short, digits, monkeypatch, what):
    """Nothing is set aside, and nothing begins anew, over an error that may be gone in a minute."""
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if what == "listdir" else checkpoint, what, fail)
        ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 2 and "(Input/output error)" in ended.err, ended
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_records_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "global_step": step}) + "\n" for step in range(5)]
    path.write_text("".join(lines) + lines[0][:9])
    assert run_log.keep_records(path, None) == lines and path.read_text() == "".join(lines)
    assert run_log.keep_records(path, 3) == lines[:3] and path.read_text() == "".join(lines[:3])
    assert run_log.keep_records(path, 7) == lines[:3]
    assert run_log.keep_records(tmp_path / "none.jsonl", 7) == []


def test_missing_records_are_reported(train_here, digits, tmp_path):
    run = tmp_path / "run"
    with at("weight step", before=killed(2)), pytest.raises(Killed):
        train_here(*arguments(digits, run, *SHORT, "checkpoint.every_steps=1"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0 and f"warning: {run}/metrics.jsonl holds 2 of the 6 records at the checkpoint" in ended.out
