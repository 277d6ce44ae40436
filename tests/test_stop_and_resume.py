"""A run that is stopped, however it is stopped, says where it stands, leaves no process, and goes on as if nothing had happened."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from dnal_dist import checkpoint, durable, ending, loop, saving, stopping, track

# 22 iterations are an epoch. Every iteration is told, so that a test can watch where a run stands.
SMALL = ("data.global_batch=16", "tracking.log_every=1", "tracking.tracker=none")
LONG = (*SMALL, "phases.pretrain.epochs=3", "phases.search.epochs=3", "phases.finetune.epochs=3")
SHORT = (*SMALL, "phases.pretrain.steps=4", "phases.search.steps=4", "phases.finetune.steps=4")


def arguments(digits: Path, run: Path, *changes: str) -> list[str]:
    shards = [f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar", f"output={run}"]
    return ["recipes/digits.yaml", *shards, *changes]


def records(run: Path, *kinds: str) -> list[dict]:
    """All records of these kinds (of all kinds, if none are given); every line must be one."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if not kinds or record["kind"] in kinds]


def told(run: Path) -> list[dict]:
    """What a run tells about its training, without what depends on the clock, and without the notes of starts and warnings."""
    clock = ("time", "seconds", "phase_seconds", "images_per_second", "data_wait_seconds")
    kept = records(run, "train", "eval", "gates", "prune", "phase", "end")
    return [{key: value for key, value in record.items() if key not in clock} for record in kept]


def tensors(run: Path) -> bytes:
    return (run / "compact" / "weights.safetensors").read_bytes()


def reach(process, run: Path, phase: str, step: int) -> None:
    """Wait until the command has taken `step` iterations of `phase`."""
    path = run / "metrics.jsonl"
    for _ in range(20_000):
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may be only half there.
        if any(f'"phase": "{phase}", "step": {step},' in line for line in lines if '"kind": "train"' in line):
            return
        if process.poll() is not None:
            pytest.fail(f"it ended before {phase} {step}: {process.communicate()}")
        time.sleep(0.005)
    pytest.fail(f"it never came to {phase} {step}")


def family(process) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    return not alive


@pytest.fixture
def one_core():
    """The number of threads decides how sums are rounded, so commands that are to be bit-equal run on as many cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


def test_a_run_stopped_in_each_phase_ends_bit_equal(train_command, train_here, one_core, digits, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    stops = (("pretrain", signal.SIGINT), ("search", signal.SIGKILL), ("search", signal.SIGUSR1), ("finetune", signal.SIGTERM))
    for number, (phase, kind) in enumerate(stops):
        # Loader processes have no say in what is learned, so a resumed run may have another number of them.
        workers = f"data.workers={0 if kind == signal.SIGKILL else 1}"
        process = train_command.start(*arguments(digits, run, *LONG, workers))
        reach(process, run, phase, 30 + number)
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
    assert [r["global_step"] for r in records(run, "train")] == list(range(1, 199))
    assert told(run) == told(whole)
    assert tensors(run) == tensors(whole)
    assert [r["resumed"] for r in records(run, "start")] == [False, True, True, True, True]
    assert len({r["tracker_run"] for r in records(run, "start")}) == 1


def test_a_second_ctrl_c_is_heeded_at_once(train_command, digits, tmp_path):
    """Where it does not come to an edge: here it waits for a batch, since its loader stands still."""
    process = train_command.start(*arguments(digits, tmp_path / "run", *SMALL, "data.workers=1", "phases.pretrain.epochs=1000"))
    reach(process, tmp_path / "run", "pretrain", 3)
    processes = family(process)
    for loader in processes[1:]:
        loader.suspend()
    # What was loaded ahead is used up.
    told = -1
    while told != (told := len(records(tmp_path / "run"))):
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(stopping.IMPATIENT + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "; the same command goes on from step-" in err and "Traceback" not in err, err
    assert all_gone(processes)


def test_a_signal_before_training_ends_it_there(train_command, digits, tmp_path):
    process = train_command.start(*arguments(digits, tmp_path / "run", *SMALL))
    until = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    # torch is loaded; what is left of the start takes another second at least.
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (stopping.STOPPED, -signal.SIGTERM), err
    assert "Traceback" not in err


def test_a_time_limit_leaves_room_for_the_last_checkpoint(train_command, digits, tmp_path):
    run = tmp_path / "run"
    ended = train_command(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=10000"), "--max-time", "25s")
    assert ended.returncode == stopping.STOPPED and "s are left of the time limit) in pretrain" in ended.stderr, ended.stderr
    # At the stop; the checkpoint was written after it.
    assert float(re.search(r"\((\d+) s are left", ended.stderr)[1]) >= 4
    assert checkpoint.latest(run / "checkpoints")[1].state.global_step == records(run, "train")[-1]["global_step"]


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
def test_what_is_no_time_is_refused(train_here, text):
    ended = train_here("recipes/digits.yaml", f"--max-time={text}")
    assert ended.code == 2 and ended.err.startswith("error: --max-time: expected a time such as 3h30m, 90m, 1d or 3:30:00, found ")


def test_the_end_of_a_slurm_job_is_a_limit(monkeypatch, tmp_path):
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert stopping.limit(None) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1900000000")
    assert stopping.limit(None) == 1_900_000_000
    assert stopping.limit("1h") < time.time() + 3600
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    # Older releases tell it only when they are asked.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %e" ] && echo 2030-03-17T17:46:40\n')
    (tmp_path / "squeue").chmod(0o755)
    assert stopping.limit(None) == time.mktime((2030, 3, 17, 17, 46, 40, 0, 0, -1))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho N/A\n")
    assert stopping.limit(None) is None


def test_a_stop_file_ends_it_politely_and_is_taken_away(train_command, digits, tmp_path):
    run = tmp_path / "run"
    process = train_command.start(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"))
    reach(process, run, "pretrain", 25)
    (run / "stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == stopping.STOPPED and f"stopped ({run}/stop is there) in pretrain" in err
    assert not (run / "stop").exists()


class Killed(BaseException):
    """Ends a run at once."""


@pytest.fixture(scope="module")
def finished(train_here, digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train_here(*arguments(digits, run, *SHORT)).code == 0
    return run


@pytest.fixture
def short(finished, tmp_path):
    """A finished short run, to be done with as one likes."""
    return shutil.copytree(finished, tmp_path / "short")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", range(5))
def test_a_run_killed_around_a_checkpoint_tells_nothing_twice(train_here, short, digits, tmp_path, monkeypatch, which, when):
    """Records of the next phase carry the same global step as the checkpoint it begins with. The five checkpoints of a short run
    are those at its start and at the ends of its phases; killed before the first, it begins anew."""
    count, save = iter(range(100)), saving.save

    def save_or_die(*state):
        number = next(count)
        if when == "after" or number != which:
            save(*state)
        if number == which:
            raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(saving, "save", save_or_die)
        train_here(*arguments(digits, run, *SHORT))
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    assert told(run) == told(short)
    assert tensors(run) == tensors(short)
    anew = f"{run}: the run ended before its first checkpoint; it begins anew"
    assert (anew in ended.out) == (which == 0 and when == "before")


@pytest.mark.parametrize("left", ["metrics.jsonl", "metrics.jsonl and an empty recipe.yaml", "half a recipe.yaml"])
def test_a_run_killed_when_it_began_begins_anew(train_here, digits, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    if "recipe" in left:
        (run / "recipe.yaml").write_text("name: di" if "half" in left else "")
    (run / ".compact.unfinished").mkdir()
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0 and [r["resumed"] for r in records(run, "start")] == [False]
    assert not list(run.glob(".*.unfinished"))


def test_a_finished_run_is_told_again_and_not_trained_again(train_here, short, digits):
    before, weights = (short / "metrics.jsonl").read_bytes(), tensors(short)
    (short / "report.html").unlink()
    ended = train_here(*arguments(digits, short, *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert "this run is finished" in ended.out and "accuracy after finetune" in ended.out
    assert (short / "metrics.jsonl").read_bytes() == before and tensors(short) == weights
    assert (short / "report.html").exists()


def test_a_run_killed_before_its_last_record_gets_it(train_here, short, digits):
    whole = told(short)
    lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"kind": "end"' in lines[-1]
    (short / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert train_here(*arguments(digits, short, *SHORT), "--resume").code == 0
    assert told(short) == whole


@pytest.mark.parametrize(
    "change, key",
    [
        ("architecture.penalty_weight=0.5", ("architecture.penalty_weight", (0.037, 0.5))),
        ("seed=1", ("seed", (0, 1))),
        ("phases.finetune.steps=5", ("phases.finetune.steps", (4, 5))),
        ("phases.search.schedule={kind: cosine, offset: 3.0}", ("phases.search.schedule.kind", ("constant", "cosine"))),
        ("data.augmentation.padding=2", ("data.augmentation.padding", (1, 2))),
    ],
)
def test_another_recipe_is_shown_and_refused(train_here, short, digits, change, key):
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    ended = train_here(*arguments(digits, short, *SHORT, change))
    assert ended.code == 2
    first, *diff, last = ended.err.splitlines()
    assert first == f"error: {short}: the recipe has changed since the run began:"
    name, values = key
    assert diff[:2] == [f"  - {name}: {values[0]}", f"  + {name}: {values[1]}"]
    assert last.startswith(f"undo that, or go on by --allow-changed {name}")
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_a_change_that_is_allowed_is_made_and_told(train_here, short, digits):
    """The finetune is made longer; not that of a run that is finished."""
    before = (short / "recipe.yaml").read_bytes()
    longer = (*arguments(digits, short, *SHORT, "phases.finetune.steps=6"), "--allow-changed", "phases.finetune")
    ended = train_here(*longer)
    assert ended.code == 2 and (short / "recipe.yaml").read_bytes() == before
    assert f"error: {short}: this run is finished, and nothing of phases.finetune.steps can change any more; undo" in ended.err
    shutil.rmtree(checkpoint.found(short / "checkpoints")[0])
    ended = train_here(*longer)
    assert ended.code == 0 and "changed: phases.finetune.steps: 4 -> 6" in ended.out, ended
    assert records(short, "start")[-1]["changed"] == {"phases.finetune.steps": [4, 6]}
    assert records(short, "train")[-1]["global_step"] == 14
    # It is the run's recipe from then on.
    assert "this run is finished" in train_here(*longer[:-2]).out and "steps: 6" in (short / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "change, allowed, told",
    [
        ("model.width=0.5", ["model.width"], r"- model\.width: 1\.0\n  \+ model\.width: 0\.5\nundo that, or begin anew"),
        ("seed=1", ["sed"], r"--allow-changed sed: no such key in the recipe"),
        ("seed=1", ["phases"], r"undo that, or go on by --allow-changed seed, or"),
    ],
)
def test_what_cannot_be_allowed(train_here, short, digits, change, allowed, told):
    options = [word for key in allowed for word in ("--allow-changed", key)]
    ended = train_here(*arguments(digits, short, *SHORT, change), *options)
    assert ended.code == 2 and re.search(told, ended.err), ended.err


def test_a_phase_cannot_become_shorter_than_it_is(train_here, digits, tmp_path, monkeypatch):
    run, longer = tmp_path / "run", (*SHORT, "phases.pretrain.steps=9")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_is_time_to_save", lambda run: die() if run.step == 6 else True)
        train_here(*arguments(digits, run, *longer))
    ended = train_here(*arguments(digits, run, *SHORT, "phases.pretrain.steps=3"), "--allow-changed", "phases.pretrain")
    assert ended.code == 2
    assert "key 'phases.pretrain': the run has taken 5 of its iterations already, so 3 are too few; make it longer" in ended.err


def die():
    raise Killed


def test_shards_may_move_but_not_change(train_here, short, digits, tmp_path):
    """The order of samples would not go on as it began, and nobody would see it."""
    moved = shutil.copytree(digits, tmp_path / "moved")
    ended = train_here(*arguments(moved, short, *SHORT))
    assert ended.code == 0 and "this run is finished" in ended.out, ended.err
    shutil.copy(digits / "train-000001.tar", moved / "train-000000.tar")
    (moved / "index.json").unlink()
    before = (short / "recipe.yaml").read_bytes()
    ended = train_here(*arguments(moved, short, *SHORT))
    assert ended.code == 2 and (short / "recipe.yaml").read_bytes() == before
    assert "error: key 'data.train': the shards are not those that the run began with; put those back, or go on by" in ended.err
    assert train_here(*arguments(moved, short, *SHORT), "--allow-changed", "data").code == 0


def test_what_has_no_say_in_the_result_may_change(train_here, short, digits):
    moved = short.rename(short.parent / "moved")
    others = ("data.workers=1", "data.cache_gb=5", "tracking.log_every=3")
    assert train_here(*arguments(digits, moved, *SHORT, *others), "--resume").code == 0


DAMAGE = {
    "tensors altered": lambda step: flip(step / "state.safetensors"),
    "position cut short": lambda step: os.truncate(step / "state.json", 100),
    "nothing": lambda step: [path.unlink() for path in step.iterdir()],
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(train_here, short, digits, fault):
    """The newest one is the run's end, the one before the end of its search and pruning."""
    whole, weights = told(short), tensors(short)
    newest, before = checkpoint.found(short / "checkpoints")
    assert (before.name, newest.name) == ("step-00000008-finetune", "step-00000012-done")
    DAMAGE[fault](newest)
    ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 0, ended.err
    assert f"warning: {newest}: checkpoint is damaged (" in ended.out
    assert "; it was passed over and is called damaged-step-00000012-done now" in ended.out
    assert "resumed in finetune after 0 steps (8 in all)" in ended.out
    assert told(short) == whole and tensors(short) == weights
    assert checkpoint.latest(short / "checkpoints")[2] == {}


# --- a disk that fails


def failing(monkeypatch, of, times=None):
    """The disk is full for checkpoints (`times` of them, or all) whose number is in `of`."""
    write, count = durable.write, iter(range(10_000))

    def full(path, content):
        if path.name == checkpoint.TENSORS and next(count) in of:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(durable, "write", full)


def test_training_goes_on_where_a_checkpoint_cannot_be_written(train_here, short, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, {1, 2})
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    warnings = [r["message"] for r in records(run, "warning")]
    told_of = (
        f"{run}/checkpoints: checkpoint cannot be written (No space left on device); the last good one is of step 0, 0 minutes old"
    )
    assert [w for w in warnings if "cannot be written" in w] == [
        f"{told_of}. Training goes on and the next save tries again: make room"
    ] * 2
    assert told(run) == told(short) and tensors(run) == tensors(short)
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step-00000012-done", "step-00000008-finetune"]


def test_a_disk_that_never_has_room_stops_the_run_after_a_while(train_here, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, range(1, 1000))
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
    monkeypatch.setattr("dnal_dist.saver.BETWEEN", 0.01)
    failing(monkeypatch, {1, 2})
    ended = train_here(*arguments(digits, run, *SHORT), "--max-time=1s")
    assert ended.code == stopping.STOPPED and "; the same command goes on from here" in ended.err
    assert checkpoint.latest(run / "checkpoints")[1].state.global_step == 1
    failing(monkeypatch, range(1000))
    ended = train_here(*arguments(digits, run, *SHORT), "--max-time=1s")
    assert ended.code == stopping.STOPPED and "; the same command goes on from step-00000001-pretrain" in ended.err


def test_a_folder_of_checkpoints_that_vanishes_is_made_again(train_here, short, digits, tmp_path, monkeypatch):
    run, save = tmp_path / "run", saving.save

    def vanish(state, *more):
        if state.phase == "search":
            state.saver.settle()
            shutil.rmtree(run / "checkpoints")
        save(state, *more)

    monkeypatch.setattr(saving, "save", vanish)
    assert train_here(*arguments(digits, run, *SHORT)).code == 0
    assert told(run) == told(short) and checkpoint.latest(run / "checkpoints")[1].state.phase == "done"


def test_records_wait_for_room(train_here, short, digits, tmp_path, monkeypatch):
    """Nothing is lost, and no checkpoint counts on records that are not there."""
    run, flush, count = tmp_path / "run", track.Track._flush, iter(range(10_000))

    def full(self):
        if 5 < next(count) < 20:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(track.Track, "_flush", full)
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 0, ended.err
    assert "metrics.jsonl: cannot be written (No space left on device); training goes on, make room" in ended.out
    assert told(run) == told(short)


def test_a_pause_is_measured_and_told(short, train_here, digits, tmp_path):
    found = records(short, "checkpoint")
    assert found[0]["name"] == "step-00000000-pretrain" and len(found) == 5
    assert all(r["pause_seconds"] >= 0 for r in found)
    assert "bytes" not in found[0] and all(r["bytes"] > 10_000 and r["write_seconds"] > 0 for r in found[1:])


def test_two_runs_do_not_share_a_folder(train_command, train_here, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    process = train_command.start(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"))
    reach(process, run, "pretrain", 3)
    monkeypatch.setattr("dnal_dist.folder.LOCK_SECONDS", 0.2)
    for option in ((), ("--overwrite",)):
        ended = train_here(*arguments(digits, run, *SMALL, "phases.pretrain.epochs=1000"), *option)
        assert ended.code == 2
        assert ended.err.startswith(
            f"error: key 'output': another process trains in {run}; wait for its end, or name another folder"
        )
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == stopping.STOPPED
    assert checkpoint.latest(run / "checkpoints")[1].state.phase == "pretrain"


def test_a_loader_process_that_dies_ends_the_run_with_a_line(train_here, digits, tmp_path, monkeypatch):
    """As the kernel does where memory is short."""

    def kill(_):
        for loader in multiprocessing.active_children():
            loader.kill()
            loader.join()

    save, count = saving.save, iter(range(100))
    monkeypatch.setattr(ending, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(saving, "save", lambda *state: save(*state) if next(count) != 1 else kill(state))
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, "data.workers=1"))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert re.match(r"error: key 'data\.workers': a loader process died \(DataLoader worker \(.*\) .*\); lower it, or give", line)


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
        f"error: key 'output': {short} holds a run without a checkpoint to go on from; replace it by --over"
    )
    assert tensors(short)


def test_checkpoints_that_are_gone_are_told_before_a_run_begins_anew(train_here, digits, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        assert train_here(*arguments(digits, run, *SHORT), "--max-time=1s").code == stopping.STOPPED
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    ended = train_here(*arguments(digits, run, *SHORT))
    assert ended.code == 2 and ended.err.startswith(
        f"error: key 'output': the checkpoints of {run} are gone, though its metrics.jsonl"
    )
    assert (run / "metrics.jsonl").read_bytes() == before
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert train_here(*arguments(digits, run, *SHORT)).code == 0


@pytest.mark.parametrize("what", ["listdir", "read_bytes"])
def test_a_disk_that_does_not_answer_is_not_taken_for_an_empty_one(train_here, short, digits, monkeypatch, what):
    """Nothing is set aside, and nothing begins anew, over an error that may be gone in a minute."""
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if what == "listdir" else Path, what, fail)
        ended = train_here(*arguments(digits, short, *SHORT))
    assert ended.code == 2 and "(Input/output error)" in ended.err, ended
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_the_tracker_goes_on_with_the_same_run(train_here, digits, tmp_path):
    run, tracked = tmp_path / "run", [change for change in SHORT if "tracker" not in change]
    assert train_here(*arguments(digits, run, *tracked), "--max-time=1s").code == stopping.STOPPED
    assert train_here(*arguments(digits, run, *tracked)).code == 0
    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert {part.name.split("-")[-1] for part in parts} == {r["tracker_run"] for r in records(run, "start")}


def test_resuming_what_never_began_begins_it(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert [r["resumed"] for r in records(tmp_path / "run", "start")] == [False]


def test_records_of_a_lost_part_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "global_step": step}) + "\n" for step in range(5)]
    path.write_text("".join(lines) + lines[0][:9])
    assert track.keep_records(path, None) == lines and path.read_text() == "".join(lines)
    assert track.keep_records(path, 3) == lines[:3] and path.read_text() == "".join(lines[:3])
    assert track.keep_records(path, 7) == lines[:3]
    assert track.keep_records(tmp_path / "none.jsonl", 7) == []


def test_records_that_are_missing_are_told(train_here, digits, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "_is_time_to_save", lambda run: die() if run.step == 3 else True)
    with pytest.raises(Killed):
        train_here(*arguments(digits, run, *SHORT))
    monkeypatch.undo()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    ended = train_here(*arguments(digits, run, *SHORT))
    assert (
        ended.code == 0 and f"warning: {run}/metrics.jsonl holds 2 of the 6 records that were told by the checkpoint" in ended.out
    )


# --- several processes


@pytest.mark.parametrize("whom", ["Ctrl-C to all", "SIGTERM to the launcher", "SIGUSR1 to one process", "SIGKILL to the launcher"])
def test_two_processes_stop_together(train_command, train_here, digits, tmp_path, whom):
    run = tmp_path / "run"
    process = train_command.start(*arguments(digits, run, *LONG, "data.workers=1"), processes=2)
    reach(process, run, "pretrain", 30)
    processes = family(process)
    # The launcher, and on each rank the training with a loader for each of its two streams.
    assert len(processes) == 7
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
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert all_gone(processes)
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
        ended = train_here(*arguments(digits, run, *LONG, "data.workers=0"))
        assert ended.code == 0, ended.err
        assert [r["global_step"] for r in records(run, "train")] == list(range(1, 199))
        assert [r["world_size"] for r in records(run, "start")] == [2, 1]
