"""Runs that are killed end as if they had not been; and the command that shows it sees it when they do not."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from dnal_dist.chaos import __main__, campaign, equality
from dnal_dist.chaos.instrument import ALWAYS, PLACES

SMALL = (
    "data.global_batch=16", "data.per_device_batch_limit=8", "tracking.log_every=1", "checkpoint.every_steps=1",
    "phases.pretrain.steps=4", "phases.search.steps=4", "phases.finetune.steps=4",
)  # fmt: skip
# Takes (code, arguments) and forks a process for each, which runs the code and then the command: torch is imported once.
HOST = """
import json, os, sys, traceback
from dnal_dist import attempt, chaos, ending, saving
for line in sys.stdin:
    code, arguments, out, err = json.loads(line)
    if not (pid := os.fork()):
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["chaos", *arguments]
        try:
            exec(code)
            chaos.main()
        except SystemExit as ended:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# Dies in its first run at the third weight step, and in no other.
ONE_KILL = """
from dnal_dist.victim import Aim
chaos.Chaos._draw = lambda *_: Aim(0, "weight step", 3, 0.0, True, 0.5)
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
    """`python -m dnal_dist.chaos` on a small run. `code` comes before; forks carry it to the victims."""

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
    return {told: verdict for verdict, told in re.findall(r"^- (pass|FAIL|not checked): (.*)$", report, re.MULTILINE)}


def test_a_run_killed_at_each_place_ends_bit_equal(chaos):
    """Every place that a kill can be aimed at, in the order in which a run comes to them."""
    code = """
from dnal_dist.victim import Aim
plan = [
    ("writing recipe.yaml", 1), ("write", 3), ("between write and fsync", 4), ("weight step", 1), ("before rename", 4),
    ("fsync", 9), ("after rename", 4), ("between parts of a batch", 2), ("removal", 1), ("evaluation", 1), ("architecture step", 1),
    ("reading a checkpoint", 1), ("pruning", 1), ("compaction", 1), ("write", 5), ("weight step", 2), ("writing compact/", 1),
    ("after the last checkpoint", 1), ("writing the report", 1),
]
kills = iter(plan)
def draw(self, reference, position):
    place, occurrence = next(kills)
    self.tally.aimed[place] += 1
    return Aim(0, place, occurrence, 0.0, True, 0.5)
chaos.Chaos._draw = draw
"""
    ended = chaos("--kills", 19, code=code)
    assert ended.code == 0, ended
    assert ended.out.startswith("# PASS: 19 kills of digits\n") and set(checks(ended.out).values()) == {"pass"}
    expected = {place: [1, 1, 0] for place in PLACES if place not in ALWAYS} | {"write": [2, 2, 0], "weight step": [2, 2, 0]}
    assert rows(ended.out) == expected
    assert "| runs, starts | 1, 20; 0 ended before" in ended.out and "| runs compared | 1 |" in ended.out


def test_kills_at_random_on_two_processes(chaos, tmp_path):
    ended = chaos("--kills", 4, "--seed", 3, "--ranks", 2, "--report", tmp_path / "report.md")
    assert ended.code == 0, ended
    assert (tmp_path / "report.md").read_text() == ended.out
    assert sum(by_aim + by_clock for _, by_aim, by_clock in rows(ended.out).values()) == 4
    # The runs that were compared have gone, the one they were compared with is there.
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith(("run-", "whole-"))] == ["whole-2"]


def test_a_resume_that_is_not_exact_fails(chaos, tmp_path):
    """The least that can go wrong: one weight is another in its last digits."""
    code = """
import torch
restore = saving.restore
def badly(run, saved):
    restore(run, saved)
    with torch.no_grad():
        next(run.network.parameters()).view(-1)[0] += 1e-6
saving.restore = badly
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    assert ended.code == 1, ended
    failed = [told for told, verdict in checks(ended.out).items() if verdict == "FAIL"]
    assert failed == ["every run is bit-equal to the uninterrupted one: architecture, weights, and all records but for the clock"]
    assert "compact/weights.safetensors is not that of the uninterrupted run" in ended.out
    assert ended.err == f"what was left is in {tmp_path / 'kept'}\n" and (tmp_path / "kept" / "run-1" / "compact").is_dir()


def test_whatever_is_left_behind_fails(chaos):
    code = """
import os, subprocess, tempfile
attempt.NOTICE = 1.0
finish = ending.finish
def leaving(run):
    subprocess.Popen(["sleep", "280"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tempfile.mkdtemp(prefix="dnal_dist-", suffix="-left")
    open(f"/dev/shm/dnal-left-{os.getpid()}", "w").close()
    return finish(run)

go = chaos.Chaos.go
def from_now_on(self, kills, tell):
    ending.finish = leaving
    return go(self, kills, tell)
chaos.Chaos.go = from_now_on
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    try:
        assert ended.code == 1, ended
        failed = [told for told, verdict in checks(ended.out).items() if verdict == "FAIL"]
        assert len(failed) == 3 and "no process is left behind" in failed and any("/dev/shm" in told for told in failed)
        assert "(sleep 280)" in ended.out and "-left" in ended.out
    finally:
        for path in Path("/dev/shm").glob("dnal-left-*"):
            path.unlink()


@pytest.mark.parametrize("removed, code", [("True", 0), ("not resumed", 1)])
def test_what_a_kill_leaves_has_to_be_gone_at_the_runs_end(chaos, removed, code):
    """A folder for temporary files that the next start finds again, and removes or not."""
    patch = f"""
import os, pathlib
main, finish = attempt.victim.main, ending.finish
def making(orders, arguments):
    place = pathlib.Path(os.environ["TMPDIR"], "dnal_dist-of-a-test")
    resumed = place.exists()
    place.mkdir(exist_ok=True)
    def removing(run):
        if {removed}:
            place.rmdir()
        return finish(run)
    ending.finish = removing
    main(orders, arguments)
attempt.victim.main = making
"""
    ended = chaos("--kills", 1, code=patch + ONE_KILL)
    assert ended.code == code, ended
    assert list(checks(ended.out).values()).count("FAIL") == code and ("  - dnal_dist-of-a-test" in ended.out) == bool(code)


@pytest.mark.parametrize(
    "fault, told",
    [
        ("raise InputError('no such luck')", "ended with exit codes [2]"),
        ("time.sleep(300)", "did not come to an end"),
    ],
)
def test_a_resume_that_does_not_end_well_fails(chaos, fault, told):
    code = f"""
import time
from dnal_dist.common.errors import InputError
def badly(run, saved):
    {fault}
saving.restore = badly
chaos.PATIENCE, chaos.STUCK = 1, 1
"""
    ended = chaos("--kills", 1, code=code + ONE_KILL)
    assert ended.code == 1, ended
    assert told in ended.out
    end, equal, folder, *others = checks(ended.out).values()
    assert (end, equal, folder, *others) == ("FAIL", "not checked", "not checked", "pass", "pass", "pass")
    assert "| runs compared | 0 |" in ended.out


@pytest.mark.parametrize(
    "fault, told",
    [
        ("sys.exit(1)", "the uninterrupted run on 1 process ended with exit codes [1]; its last lines:"),
        (
            "tempfile.mkdtemp(prefix='dnal_dist-')",
            "the uninterrupted run on 1 process left temporary files (dnal_dist-",
        ),
    ],
)
def test_nothing_is_held_to_a_reference_that_did_not_end_well(chaos, tmp_path, fault, told):
    code = f"""
import sys, tempfile
finish = ending.finish
def badly(run):
    code = finish(run)
    {fault}
    return code
ending.finish = badly
"""
    ended = chaos("--kills", 1, code=code)
    assert ended.code == 2 and ended.out == "" and ended.err.startswith(f"error: {told}"), ended
    assert (tmp_path / "kept" / "whole-1" / "compact").is_dir()


def test_a_sigterm_leaves_neither_processes_nor_a_folder(chaos, tmp_path):
    """While a process writes into the folder all the time, in a session of its own."""
    (tmp_path / "temporary").mkdir()
    code = f"""
import itertools, pathlib, signal, tempfile
tempfile.tempdir = {str(tmp_path / "temporary")!r}
def writing(run):
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    folder = pathlib.Path(os.environ["TMPDIR"])
    os.kill(os.getppid(), signal.SIGTERM)
    for number in itertools.count():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(number)).touch()
ending.finish = writing
"""
    ended = chaos(code="import os" + code, keep=False)
    assert ended.code == 143 and ended.err == "", ended
    assert not list((tmp_path / "temporary").iterdir()) and not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "options, told",
    [
        (["seeed=1"], "error: .*unknown key 'seeed'"),
        (["--ranks", "2,x"], r".*error: argument --ranks: expected numbers of processes such as 2 or 1,2, found '2,x'"),
        (["output=x"], "error: override 'output=x': chaos runs into folders of its own"),
        (["--config_file", "no.yaml"], "error: --config_file no.yaml: no such file"),
        (["--report", "no/such/report.md"], "error: --report no/such/report.md: there is no folder no/such"),
        (
            ["data.train=nowhere/*.tar"],
            "error: the uninterrupted run on 1 process ended with exit codes \\[2\\]; its last lines:",
        ),
    ],
)
def test_bad_input_is_told(chaos, options, told):
    ended = chaos(*options)
    assert ended.code == 2 and re.match(f"(?s){told}", ended.err), ended.err


# --- what is compared, without processes


def record(kind: str, global_step: int, **values) -> dict:
    return {"kind": kind, "time": 1.5 * global_step, "global_step": global_step} | values


WHOLE = [
    record("start", 0, world_size=1),
    record("train", 1, step=1, phase="search", loss=1.0, images_per_second=9.0),
    record("receipt", 2, epoch=0, batches=2, samples=8, digest="ab", ordered="cd", skipped=[]),
    record("eval", 2, step=2, phase="search", accuracy=0.75),
    record("end", 2, images=8, seconds=3.0),
]


@pytest.fixture
def whole(tmp_path):
    return made(tmp_path / "whole", WHOLE)


def made(folder: Path, records: list[dict], weights: bytes = b"weights") -> Path:
    (folder / "compact").mkdir(parents=True)
    (folder / "compact" / "weights.safetensors").write_bytes(weights)
    (folder / "compact" / "architecture.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def changed(number: int, **values) -> list[dict]:
    return [one | values if at == number else one for at, one in enumerate(WHOLE)]


def test_what_may_differ_between_equal_runs(whole, tmp_path):
    records = [one | {"time": 0.0} for one in changed(1, images_per_second=1.0)]
    records[2:2] = [record("start", 1, world_size=2), record("warning", 1, message="a"), record("checkpoint", 1)]
    assert equality.same(made(tmp_path / "run", records), whole) == []


@pytest.mark.parametrize(
    "records, told",
    [
        (changed(1, loss=1.0 + 1e-9), "record 0: train at step 1: loss 1.000000001 for 1.0"),
        (changed(2, ordered="dc"), "record 1: receipt at step 2: ordered 'dc' for 'cd'"),
        (WHOLE[:-1], "3 records of training, expected 4"),
        ([*WHOLE, WHOLE[-1]], "5 records of training, expected 4"),
        ([WHOLE[1], *WHOLE], "record 1: train at step 1: "),
    ],
)
def test_what_may_not(whole, tmp_path, records, told):
    (found,) = equality.same(made(tmp_path / "run", records), whole)
    assert found.startswith(told)


def test_weights_that_differ_and_lines_that_are_no_record(whole, tmp_path):
    assert equality.same(made(tmp_path / "run", WHOLE, b"weight5"), whole) == [
        "compact/weights.safetensors is not that of the uninterrupted run"
    ]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 6 is no record"):
        equality.told(tmp_path / "run")


@pytest.mark.parametrize("line, told", [("{}", "KeyError: 'kind'"), ("3", "TypeError: ")])
def test_a_record_that_is_none_is_a_check_that_failed(whole, tmp_path, monkeypatch, line, told):
    monkeypatch.setattr(__main__, "isolated", lambda *_: 0)
    run = made(tmp_path / "run", WHOLE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    tally = campaign.Tally()
    campaign.Chaos._compare(SimpleNamespace(references={1: SimpleNamespace(folder=whole)}, exact=True, tally=tally), run)
    ((check, found),) = tally.faults
    assert check == "equal" and told in found and tally.compared == 1


@pytest.mark.parametrize(
    "records, told",
    [
        (changed(1, loss=2.0), None),
        (changed(3, accuracy=0.74), None),
        (changed(3, accuracy=0.7), "accuracy 70.00%, of the uninterrupted run 75.00%"),
        (changed(2, digest="ba"), "the samples and their order are not"),
        (changed(1, step=2), "the steps told are not"),
    ],
)
def test_runs_on_other_numbers_of_processes(whole, tmp_path, records, told):
    found = equality.alike(made(tmp_path / "run", records), whole, 0.02)
    assert (found == []) if told is None else found[0].startswith(told)
    shutil.rmtree(tmp_path / "run")
