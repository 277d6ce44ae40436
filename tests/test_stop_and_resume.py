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

from dnal_dist import checkpoint, phases, track, train

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
    stops = (("pretrain", signal.SIGINT), ("search", signal.SIGKILL), ("finetune", signal.SIGTERM))
    for number, (phase, kind) in enumerate(stops):
        # Loader processes have no say in what is learned, so a resumed run may have another number of them.
        workers = f"data.workers={0 if kind == signal.SIGKILL else 1}"
        process = train_command.start(*arguments(digits, run, *LONG, workers), *["--resume"] * (number > 0))
        reach(process, run, phase, 30)
        processes = family(process)
        assert len(processes) == (1 if kind == signal.SIGKILL else 3)
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
        assert all_gone(processes)
        last = records(run, "train")[-1]
        assert last["phase"] == phase
        if kind == signal.SIGKILL:
            assert process.returncode == -kind
            continue
        assert process.returncode == 130
        saved = last["global_step"] - last["step"] + 22
        # The signal may come when a step is taken and not yet recorded.
        where = [f"stopped in {phase} after {last['step'] + n} steps ({last['global_step'] + n} in all)" for n in (0, 1)]
        assert err.strip() in [f"{one}; its last checkpoint is at step {saved}: go on with --resume" for one in where]
        assert ("resumed in" in out) == (number > 0)
    ended = train_here(*arguments(digits, run, *LONG, "data.workers=0"), "--resume")
    assert ended.code == 0 and "resumed in finetune after 22 steps (154 in all)" in ended.out, ended

    assert train_here(*arguments(digits, whole, *LONG)).code == 0
    assert [r["global_step"] for r in records(run, "train")] == list(range(1, 199))
    assert told(run) == told(whole)
    assert tensors(run) == tensors(whole)
    assert [r["resumed"] for r in records(run, "start")] == [False, True, True, True]


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
@pytest.mark.parametrize("which", range(4))
def test_a_run_killed_around_a_checkpoint_tells_nothing_twice(train_here, short, digits, tmp_path, monkeypatch, which, when):
    """Records of the next phase carry the same global step as the checkpoint it begins with. The four checkpoints of a short run
    are those at the ends of its phases; killed before the first, it begins anew."""
    count, save = iter(range(100)), checkpoint.save

    def save_or_die(state):
        number = next(count)
        if when == "after" or number != which:
            save(state)
        if number == which:
            raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(phases.checkpoint, "save", save_or_die)
        train_here(*arguments(digits, run, *SHORT))
    ended = train_here(*arguments(digits, run, *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert told(run) == told(short)
    assert tensors(run) == tensors(short)
    anew = f"{run}: the run ended before its first checkpoint; it begins anew"
    assert (anew in ended.out) == (which == 0 and when == "before")


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
        ("architecture.penalty_weight=0.5", r"architecture\.penalty_weight: 0\.\d+ -> 0\.5"),
        ("seed=1", r"seed: 0 -> 1"),
        ("phases.finetune.steps=5", r"phases\.finetune\.steps: 4 -> 5"),
        ("phases.search.schedule={kind: cosine, offset: 3.0}", r"phases\.search\.schedule\.offset: \S+ -> 3\.0"),
        ("data.augmentation.padding=2", r"data\.augmentation\.padding: 1 -> 2"),
    ],
)
def test_another_recipe_is_refused(train_here, short, digits, change, key):
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    ended = train_here(*arguments(digits, short, *SHORT, change), "--resume")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert re.match(rf"error: {short}: the recipe has changed since the run began \(.*{key}.*\); undo that, or ", line)
    assert {path: path.read_bytes() for path in short.rglob("*") if path.is_file()} == before


def test_what_has_no_say_in_the_result_may_change(train_here, short, digits):
    moved = short.rename(short.parent / "moved")
    others = ("data.workers=1", "data.cache_gb=5", "tracking.log_every=3")
    assert train_here(*arguments(digits, moved, *SHORT, *others), "--resume").code == 0


DAMAGE = {
    "tensors cut short": lambda step: os.truncate(step / "state.safetensors", 1000),
    "tensors altered": lambda step: flip(step / "state.safetensors"),
    "no tensors": lambda step: (step / "state.safetensors").unlink(),
    "position cut short": lambda step: os.truncate(step / "state.json", 100),
    "position of another kind": lambda step: (step / "state.json").write_text("[]"),
    "position without a key": lambda step: (step / "state.json").write_text('{"sha256": "0"}'),
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
    before, newest = sorted((short / "checkpoints").glob("step-*"))
    assert (before.name, newest.name) == ("step-00000008", "step-00000012")
    DAMAGE[fault](newest)
    ended = train_here(*arguments(digits, short, *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert f"warning: {newest}: checkpoint is damaged and was passed over (" in ended.out
    assert "resumed in finetune after 0 steps (8 in all)" in ended.out
    assert told(short) == whole and tensors(short) == weights
    assert checkpoint.latest(short / "checkpoints")[1] == []


def test_a_loader_process_that_dies_ends_the_run_with_a_line(train_here, digits, tmp_path, monkeypatch):
    """As the kernel does where memory is short."""

    def kill(_):
        for loader in multiprocessing.active_children():
            loader.kill()
            loader.join()

    monkeypatch.setattr(train, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(phases.checkpoint, "save", kill)
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT, "data.workers=1"))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert re.match(r"error: key 'data\.workers': a loader process died \(DataLoader worker \(.*\) .*\); lower it, or give", line)


def test_no_whole_checkpoint_is_left(train_here, short, digits):
    for step in (short / "checkpoints").glob("step-*"):
        flip(step / "state.safetensors")
    before = (short / "metrics.jsonl").read_bytes()
    ended = train_here(*arguments(digits, short, *SHORT), "--resume")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "step-00000012: checkpoint is damaged" in line and "--overwrite" in line
    assert (short / "metrics.jsonl").read_bytes() == before


def test_a_result_without_a_checkpoint_is_not_thrown_away(train_here, short, digits):
    shutil.rmtree(short / "checkpoints")
    ended = train_here(*arguments(digits, short, *SHORT), "--resume")
    assert ended.code == 2
    assert ended.err.startswith(f"error: key 'output': {short} already holds another run; it has no checkpoint to resume from, or")
    assert tensors(short)


def test_resuming_what_never_began_begins_it(train_here, digits, tmp_path):
    ended = train_here(*arguments(digits, tmp_path / "run", *SHORT), "--resume")
    assert ended.code == 0, ended.err
    assert [r["resumed"] for r in records(tmp_path / "run", "start")] == [False]


def test_an_unfinished_checkpoint_is_none(tmp_path):
    """Killed while it was written: it has no name yet, and the next one of that name is whole."""
    (tmp_path / ".step-00000022.unfinished").mkdir()
    (tmp_path / ".step-00000022.unfinished" / "state.json").write_text("{")
    assert checkpoint.latest(tmp_path) == (None, [])
    state = dict.fromkeys([*checkpoint.POSITION, "records", "compact", "recipe"], 0) | {"global_step": 22}
    checkpoint.write(tmp_path, checkpoint.Checkpoint({}, state))
    saved, faults = checkpoint.latest(tmp_path)
    assert saved.state["global_step"] == 22 and not faults
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000022"]


def test_records_of_a_lost_part_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "global_step": step}) + "\n" for step in range(5)]
    path.write_text("".join(lines) + lines[0][:9])
    assert track.keep_records(path, None) == lines and path.read_text() == "".join(lines)
    assert track.keep_records(path, 3) == lines[:3] and path.read_text() == "".join(lines[:3])
    assert track.keep_records(path, 7) == lines[:3]
    assert track.keep_records(tmp_path / "none.jsonl", 7) == []


# --- several processes


@pytest.mark.parametrize("whom", ["Ctrl-C to all", "SIGTERM to the launcher"])
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
    else:
        process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert all_gone(processes)
    last = records(run, "train")[-1]
    stands = [line for line in err.splitlines() if line.startswith("stopped ")]
    # The signal may come when a step is taken and not yet recorded.
    told = "stopped in pretrain after {0} steps ({0} in all); its last checkpoint is at step 22: go on with --resume"
    assert stands in ([told.format(last["step"])], [told.format(last["step"] + 1)]), err
    # The launcher shows where it was itself; the processes do not.
    assert "/train.py" not in err and "KeyboardInterrupt" not in err, err

    # One process goes on where two began.
    ended = train_here(*arguments(digits, run, *LONG, "data.workers=0"), "--resume")
    assert ended.code == 0, ended.err
    assert [r["global_step"] for r in records(run, "train")] == list(range(1, 199))
    assert [r["world_size"] for r in records(run, "start")] == [2, 1]
