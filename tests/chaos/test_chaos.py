"""Killed runs end as undisturbed ones, and the command that shows it finds the fault when one does not."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from dnal_dist.chaos.instrument import AIMABLE

SMALL = (
    "data.global_batch=16", "data.per_device_batch_limit=8", "tracking.log_every=1", "checkpoint.every_steps=1",
    "phases.pretrain.steps=4", "phases.search.steps=4", "phases.finetune.steps=4", "architecture.recalibration_batches=2",
)  # fmt: skip
# Takes (code, arguments) and forks a process for each, which runs the code and then the command: torch is imported once, and so is
# what a report is drawn with.
HOST = """
import contextlib, gc, json, os, signal, subprocess, sys, tempfile, time, traceback
from pathlib import Path
import matplotlib.backends.backend_svg, matplotlib.figure
import torch
from dnal_dist.chaos import __main__, attempt, campaign
from dnal_dist.chaos.instrument import Aim
from dnal_dist.common import span
from dnal_dist.common.errors import InputError
from dnal_dist.training import phases

def at(name, do):
    def listener(found, detail):
        if found == name:
            do(detail)
        return contextlib.nullcontext()
    span.attach(listener)

gc.collect()
gc.freeze()
for line in sys.stdin:
    code, arguments, out, err = json.loads(line)
    if not (pid := os.fork()):
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["chaos", *arguments]
        try:
            exec(code)
            __main__.main()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# The first run dies at its third weight step, and no other dies. What `at` attaches is inherited by the processes of all runs.
ONE_KILL = """
campaign.draw_kill = lambda *_: Aim(0, "weight step", 3, 0.0, False, True, 0.5)
"""
ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def host():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOST], cwd=ROOT, **pipes) as process:
        yield process


@pytest.fixture
def chaos(digits, tmp_path, host):
    """`python -m dnal_dist.chaos` on a small run. `code` runs first; the forked processes of the run inherit what it changes."""

    def run(*options: str, code: str = "", keep: bool = True) -> Ended:
        shards = (f"data.train={digits}/train-000000.tar", f"data.val={digits}/val-000000.tar")
        arguments = ["recipes/digits.yaml", *shards, *SMALL, *map(str, options)]
        arguments += ["--keep", str(tmp_path / "kept")] if keep else []
        out, err = tmp_path / "out", tmp_path / "err"
        host.stdin.write(json.dumps([code, arguments, str(out), str(err)]) + "\n")
        host.stdin.flush()
        return Ended(int(host.stdout.readline()), out.read_text(), err.read_text())

    return run


def rows(report: str) -> dict[str, list[int]]:
    """place: aimed at, hit by aim, hit by the clock."""
    found = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", report, re.MULTILINE)
    return {place: [int(number) for number in numbers] for place, *numbers in found}


def checks(report: str) -> dict[str, str]:
    """Outcome of each check, by its property."""
    return {held: outcome for outcome, held in re.findall(r"^- (pass|FAIL|not checked): (.*)$", report, re.MULTILINE)}


# (place, occurrence, whether at its end): every place that a kill can be aimed at. The number of steps between two checkpoints
# depends on the writer, so the kills within it come where enough steps are left.
PLAN = [
    ("recipe write", 1, False), ("write", 3, False), ("fsync", 4, False), ("write", 4, True), ("data wait", 1, False),
    ("weight step", 1, False), ("rename", 4, False), ("forward", 2, False), ("backward", 2, True), ("optimizer", 1, True),
    ("evaluation", 1, False), ("gather", 1, False), ("architecture step", 1, False), ("sync", 1, True),
    ("checkpoint read", 1, False), ("prune", 1, False), ("compaction", 1, False), ("removal", 1, False), ("logging", 3, True),
    ("checkpoint", 1, True), ("checkpoint write", 2, False), ("fsync", 9, False), ("rename", 4, True), ("write", 5, False),
    ("weight step", 2, True), ("compact write", 1, False), ("after the last checkpoint", 1, False), ("report", 1, False),
]  # fmt: skip


def test_a_run_killed_at_each_place_ends_bit_equal(chaos):
    # Where checkpoints are written late, a run may end before its kill; the plan then begins again, with another run.
    code = f"""
import itertools
kills = itertools.cycle({PLAN})
def draw(*_):
    place, occurrence, leaving = next(kills)
    return Aim(0, place, occurrence, 0.0, leaving, True, 0.5)
campaign.draw_kill = draw
"""
    ended = chaos("phases.finetune.steps=16", "--kills", len(PLAN), code=code)
    assert ended.code == 0, ended
    assert ended.out.startswith(f"# PASS: {len(PLAN)} kills of digits\n") and set(checks(ended.out).values()) == {"pass"}
    aimed = Counter(place for place, _, _ in PLAN)
    assert aimed.keys() == set(AIMABLE)
    hits = {place: by_aim for place, (_, by_aim, _) in rows(ended.out).items() if by_aim}
    assert sum(hits.values()) == len(PLAN) and len(hits) >= len(AIMABLE) - 3, hits


def test_random_kills_on_two_processes_change_nothing(chaos, tmp_path):
    ended = chaos("--kills", 2, "--seed", 3, "--ranks", 2, "--report", tmp_path / "report.md")
    assert ended.code == 0, ended
    assert (tmp_path / "report.md").read_text() == ended.out
    assert sum(by_aim + by_clock for _, by_aim, by_clock in rows(ended.out).values()) == 2
    # The runs that were compared have gone, the one they were compared with is there.
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith(("run-", "whole-"))] == ["whole-2"]


def test_a_resume_that_is_not_exact_fails(chaos, tmp_path):
    """The smallest fault: one weight differs in its last digits after a resume."""
    code = """
def change_weight(run):
    if run.resumed:
        with torch.no_grad():
            next(run.network.parameters()).view(-1)[0] += 1e-6
at("training", change_weight)
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    assert ended.code == 1, ended
    failed = [held for held, outcome in checks(ended.out).items() if outcome == "FAIL"]
    assert failed == ["every run is bit-equal to the uninterrupted one: architecture, weights, and all records but for the clock"]
    assert "compact/weights.safetensors is not that of the uninterrupted run" in ended.out
    assert ended.err == f"the run folders are kept in {tmp_path / 'kept'}\n" and (tmp_path / "kept" / "run-1" / "compact").is_dir()


def test_leftovers_of_any_kind_fail(chaos):
    code = """
attempt.NOTICE = 1.0
def leave(_):
    # The reference run may leave nothing.
    if "tmp-run-" in os.environ["TMPDIR"]:
        subprocess.Popen(["sleep", "280"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tempfile.mkdtemp(prefix="dnal_dist-", suffix="-left")
        open(f"/dev/shm/dnal-left-{os.getpid()}", "w").close()
at("report", leave)
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    try:
        assert ended.code == 1, ended
        failed = [held for held, outcome in checks(ended.out).items() if outcome == "FAIL"]
        assert len(failed) == 3 and "no process is left behind" in failed and any("/dev/shm" in held for held in failed)
        assert "(sleep 280)" in ended.out and "-left" in ended.out
    finally:
        for path in Path("/dev/shm").glob("dnal-left-*"):
            path.unlink()


@pytest.mark.parametrize("removed, code", [("True", 0), ("not resumed", 1)])
def test_leftovers_of_a_kill_must_be_gone_at_the_end_of_the_run(chaos, removed, code):
    """A folder for temporary files that the next start finds again, and removes or not."""
    patch = f"""
def make(_):
    global place, resumed
    place = Path(os.environ["TMPDIR"], "dnal_dist-of-a-test")
    resumed = place.exists()
    place.mkdir(exist_ok=True)
def remove(_):
    if {removed}:
        place.rmdir()
at("training", make)
at("report", remove)
"""
    ended = chaos("--kills", 1, code=patch + ONE_KILL)
    assert ended.code == code, ended
    assert list(checks(ended.out).values()).count("FAIL") == code and ("  - dnal_dist-of-a-test" in ended.out) == bool(code)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise InputError('no such luck')", "ended with exit codes [2]"),
        ("time.sleep(300)", "did not come to an end"),
    ],
)
def test_a_resume_that_raises_or_hangs_fails(chaos, fault, message):
    code = f"""
def fail(run):
    if run.resumed:
        {fault}
at("training", fail)
campaign.PATIENCE, campaign.STUCK = 1, 1
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    assert ended.code == 1, ended
    assert message in ended.out
    end, equal, folder, *others = checks(ended.out).values()
    assert (end, equal, folder, *others) == ("FAIL", "not checked", "not checked", "pass", "pass", "pass")
    assert "| runs compared | 0 |" in ended.out


@pytest.mark.parametrize(
    "fault, message",
    [
        ("sys.exit(1)", "the uninterrupted run on 1 process ended with exit codes [1]; its last lines:"),
        (
            "tempfile.mkdtemp(prefix='dnal_dist-')",
            "the uninterrupted run on 1 process left temporary files (dnal_dist-",
        ),
    ],
)
def test_a_reference_that_does_not_end_well_is_refused(chaos, tmp_path, fault, message):
    ended = chaos("--kills", 1, code=f"at('report', lambda _: {fault})")
    assert ended.code == 2 and ended.out == "" and ended.err.startswith(f"error: {message}"), ended
    assert (tmp_path / "kept" / "whole-1" / "compact").is_dir()


def test_a_sigterm_leaves_neither_processes_nor_a_folder(chaos, tmp_path):
    """While a process of the run, in a session of its own, writes into the folder all the time."""
    (tmp_path / "temporary").mkdir()
    code = f"""
import itertools
tempfile.tempdir = {str(tmp_path / "temporary")!r}
def write(_):
    Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    folder = Path(os.environ["TMPDIR"])
    os.kill(os.getppid(), signal.SIGTERM)
    for number in itertools.count():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(number)).touch()
at("report", write)
"""
    ended = chaos(code=code, keep=False)
    assert ended.code == 143 and ended.err == "", ended
    assert not list((tmp_path / "temporary").iterdir()) and not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "options, message",
    [
        (["seeed=1"], "error: .*unknown key 'seeed'"),
        (["--ranks", "2,x"], r".*error: argument --ranks: expected a whole number of 1 or more, found 'x'"),
        (["output=x"], "error: override 'output=x': chaos runs into folders of its own"),
        (["--config_file", "no.yaml"], "error: --config_file no.yaml: no such file"),
        (["--report", "no/such/report.md"], "error: --report no/such/report.md: there is no folder no/such"),
        (
            ["data.train=nowhere/*.tar"],
            "error: the uninterrupted run on 1 process ended with exit codes \\[2\\]; its last lines:",
        ),
    ],
)
def test_bad_input_ends_with_one_line(chaos, options, message):
    ended = chaos(*options)
    assert ended.code == 2 and re.match(f"(?s){message}", ended.err), ended.err
