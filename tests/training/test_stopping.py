"""A run that is stopped, however it is stopped, says where it stands, leaves no process, and goes on as if nothing had happened."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import LONG, SHORT, SMALL, all_gone, arguments, at, family, reach, records, tensors, training_records

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.common import errors
from dnal_dist.training import command, exit, stopping


def test_a_run_stopped_in_each_phase_ends_bit_equal(train_command, train_here, digits, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    stops = (("pretrain", signal.SIGINT), ("search", signal.SIGKILL), ("search", signal.SIGUSR1), ("finetune", signal.SIGTERM))
    for number, (phase, kind) in enumerate(stops):
        # Loader processes have no say in what is learned, so a resumed run may have another number of them.
        workers = f"data.workers={0 if kind == signal.SIGKILL else 1}"
        process = train_command.start(*arguments(digits, run, *LONG, workers))
        # Once evaluated, so that it has loaders of both streams.
        reach(process, run, phase, 8 + number if number else 30, number + 1)
        processes = family(process)
        # A loader for each of its two streams; a run that goes on may not have evaluated yet.
        assert len(processes) in ({1} if kind == signal.SIGKILL else {3} if number == 0 else {2, 3})
        if kind == signal.SIGTERM:
            # A cluster may send it to all processes of a job; the loaders are for the training process to end.
            for one in processes[1:]:
                one.send_signal(kind)
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
        assert all_gone(processes)
        assert ("resumed in" in out) == (number > 0)
        last = records(run, "train")[-1]
        assert last["phase"] == phase
        if kind == signal.SIGKILL:
            assert process.returncode == -kind
            continue
        assert process.returncode == stopping.STOPPED, (out, err)
        where = f"in {phase} after {last['step']} steps ({last['global_step']} in all)"
        assert err.strip() == f"stopped ({kind.name}) {where}; the same command goes on from here"
        (stop,) = (r for r in records(run, "stop") if r["global_step"] == last["global_step"])
        assert (stop["reason"], stop["phase"], stop["step"]) == (kind.name, phase, last["step"])
    ended = train_here(*arguments(digits, run, *LONG, "data.workers=0"))
    assert ended.code == 0 and f"resumed in finetune after {last['step']} steps" in ended.out, ended

    assert train_here(*arguments(digits, whole, *LONG)).code == 0
    assert [r["global_step"] for r in records(run, "train")] == list(range(1, 155))
    assert training_records(run) == training_records(whole)
    assert tensors(run) == tensors(whole)
    assert [r["resumed"] for r in records(run, "start")] == [False, True, True, True, True]
    assert len({r["tracker_run"] for r in records(run, "start")}) == 1


def test_a_second_ctrl_c_ends_the_run_at_once(train_command, digits, tmp_path):
    """Where it does not come to an edge: here it waits for a batch, since its loader stands still."""
    process = train_command.start(*arguments(digits, tmp_path / "run", *SMALL, "data.workers=1", "phases.pretrain.epochs=1000"))
    reach(process, tmp_path / "run", "pretrain", 3)
    processes = family(process)
    for loader in processes[1:]:
        loader.suspend()
    # What was loaded ahead is used up.
    count = -1
    while count != (count := len(records(tmp_path / "run"))):
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(stopping.IMPATIENT + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "; the same command goes on from step-" in err and "Traceback" not in err, err
    assert all_gone(processes)


def test_a_signal_before_training_ends_it_there(digits, tmp_path):
    command = [sys.executable, "-m", "dnal_dist.train", *arguments(digits, tmp_path / "run", *SMALL)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    # torch is loaded; what is left of the start takes another second at least.
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (stopping.STOPPED, -signal.SIGTERM), err
    assert "Traceback" not in err


def test_a_time_limit_leaves_room_for_the_last_checkpoint(train_here, digits, tmp_path):
    run = tmp_path / "run"
    # It counts from the start of this process.
    limit = f"{round(time.time() - psutil.Process().create_time()) + 12}s"
    ended = train_here(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=10000"), "--max-time", limit)
    left = re.search(r"\((\d+) s are left of the time limit \(--max-time, or the SLURM job\)\) in pretrain", ended.err)
    assert ended.code == stopping.STOPPED and left, ended.err
    # At the stop; the checkpoint was written after it.
    assert float(left[1]) >= 4 and len(records(run, "train")) > 1
    assert checkpoint.latest(run / "checkpoints")[1].state.global_step == records(run, "train")[-1]["global_step"]


@pytest.mark.parametrize(("tracker", "leaving"), [("none", 0.0), ("tensorboard", 15.0)])
def test_a_time_limit_counts_what_a_tracker_may_take_to_end(train_here, digits, tmp_path, monkeypatch, tracker, leaving):
    given = []

    def poll(*arguments):
        given.append(stopping.StopPoll(*arguments))
        raise errors.InputError("far enough")

    monkeypatch.setattr(command, "StopPoll", poll)
    assert train_here(*arguments(digits, tmp_path, *SHORT, f"tracking.tracker={tracker}"), "--max-time=1h").code == 2
    (found,) = given
    assert found.leaving == leaving
    found.until, found.leaving = time.time() + 1000, 0.0
    assert not found.poll()
    found.left, found.leaving = 1, 1000.0
    with pytest.raises(stopping.Stopped, match="of the time limit"):
        found.poll()


def test_a_limit_that_has_passed_lets_a_step_be_taken(train_here, digits, tmp_path):
    """Or a job with too little time would be tried again for ever, without getting on."""
    steps = []
    for _ in range(3):
        ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), "--max-time", "1s")
        assert ended.code == stopping.STOPPED
        steps.append(checkpoint.latest(tmp_path / "run" / "checkpoints")[1].state.global_step)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    "text, seconds", [("3h30m", 12_600), ("90m", 5400), ("1d", 86_400), ("45s", 45), ("3:30:00", 12_600), ("1-12:00:00", 129_600)]
)
def test_times_are_read(text, seconds):
    assert stopping.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "soon", "0s", "3h 30m x", "-1h", "30m3h"])
def test_malformed_times_are_refused(train_here, text):
    ended = train_here("recipes/digits.yaml", f"--max-time={text}")
    assert ended.code == 2 and ended.err.startswith("error: --max-time: expected a time such as 3h30m, 90m, 1d or 3:30:00, found ")


def test_the_end_of_a_slurm_job_is_a_limit(monkeypatch, tmp_path, capsys):
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert stopping.limit(None) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    assert stopping.limit(None) == 1_900_000_000
    assert stopping.limit("1h") < time.time() + 3600
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert stopping.limit(None) is None
    assert "SLURM_JOB_END_TIME=1700000000 is over, left by another job: it is ignored; unset it" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    # Older releases tell it only when they are asked.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %e" ] && echo 2030-03-17T17:46:40\n')
    (tmp_path / "squeue").chmod(0o755)
    assert stopping.limit(None) == time.mktime((2030, 3, 17, 17, 46, 40, 0, 0, -1))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho N/A\n")
    assert stopping.limit(None) is None


def test_a_stop_file_stops_the_run_and_is_removed(train_command, digits, tmp_path):
    run = tmp_path / "run"
    process = train_command.start(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"))
    reach(process, run, "pretrain", 25)
    (run / "stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == stopping.STOPPED and f"stopped ({run}/stop is there) in pretrain" in err
    assert not (run / "stop").exists()


def test_a_loader_process_that_dies_ends_the_run_with_a_line(train_here, digits, tmp_path, monkeypatch):
    """As the kernel does where memory is short."""

    def kill(number, _):
        for loader in multiprocessing.active_children() if number == 1 else ():
            loader.kill()
            loader.join()

    monkeypatch.setattr(exit, "PATIENCE_SECONDS", 0.1)
    with at("checkpoint", before=kill):
        ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, "data.workers=1"))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert re.match(r"error: key 'data\.workers': a loader process died \(DataLoader worker \(.*\) .*\); lower it, or give", line)


def job(process) -> list[psutil.Process]:
    """All processes that write their errors where this one does: those that it started, and their forks."""
    found, own = [], os.fstat(process.err.fileno())
    for one in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{one.pid}/fd/2"), own):
                found.append(one)
    return found


@pytest.mark.parametrize("whom", ["Ctrl-C to all", "SIGTERM to the launcher", "SIGUSR1 to one process", "SIGKILL to the launcher"])
def test_two_processes_stop_together(train_command, train_here, digits, tmp_path, whom):
    run = tmp_path / "run"
    changes = (*SMALL, "phases.pretrain.epochs=4", "phases.search.steps=4", "phases.finetune.steps=4")
    # Ranks that are forks are no children of their launcher, by which they hear that it is gone; it starts what passes signals on.
    forked = whom != "SIGKILL to the launcher"
    process = train_command.start(*arguments(digits, run, *changes, "data.workers=1"), processes=2, forked=forked)
    reach(process, run, "pretrain", 30)
    processes = job(process)
    # The launcher, and on each rank the training with a loader for each of its two streams.
    assert len(processes) == 7 + 2 * forked
    if whom == "Ctrl-C to all":
        # A terminal sends it to every process of the foreground job.
        for one in processes:
            one.send_signal(signal.SIGINT)
    elif whom == "SIGUSR1 to one process":
        ranks = [one for one in processes if one.ppid() == process.pid and one.environ().get("RANK") == "1"]
        ranks[0].send_signal(signal.SIGUSR1)
    elif whom == "SIGTERM to the launcher":
        process.terminate()
    else:
        process.kill()
    # The ranks may outlive their launcher.
    assert all_gone(processes)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    last = records(run, "train")[-1]
    (stand,) = [line for line in err.splitlines() if line.startswith("stopped ")]
    assert stand.endswith(f" in pretrain after {last['step']} steps ({last['step']} in all); the same command goes on from here"), (
        err
    )
    # Between processes only one may have heard it.
    assert stand.split(")")[0].split("(")[1] in ("SIGINT", "SIGTERM", "SIGUSR1", "a signal", "the launcher is gone")
    # The launcher shows where it was itself; the processes do not.
    assert "/train.py" not in err and "KeyboardInterrupt" not in err, err
    assert checkpoint.latest(run / "checkpoints")[1].state.global_step == last["step"]

    # One process goes on where two began.
    if whom == "Ctrl-C to all":
        ended = train_here(*arguments(digits, run, *changes, "data.workers=0"))
        assert ended.code == 0, ended.err
        assert [r["global_step"] for r in records(run, "train")] == list(range(1, 97))
        assert [r["world_size"] for r in records(run, "start")] == [2, 1]
