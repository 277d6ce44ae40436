"""The table of `python -m dnal_dist.runs`: real ones in each state, and broken ones."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from runs import SHORT, arguments

from dnal_dist import runs
from dnal_dist.common import lock
from dnal_dist.common import lock as occupation
from dnal_dist.common.lock import occupied
from dnal_dist.report import run_list


def records_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run: Path, records: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def cut(run: Path, *kinds: str) -> None:
    """Leave the records before the first of these kinds."""
    records = records_of(run)
    rewrite(run, records[: next(i for i, record in enumerate(records) if record["kind"] in kinds)])


def submit(run: Path, job: str) -> None:
    (run / "submit").mkdir(parents=True)
    (run / "submit" / "jobs.jsonl").write_text(
        json.dumps({"job": "1", "time": 1}) + "\n" + json.dumps({"job": job, "time": 2}) + "\n"
    )


def test_a_finished_run_is_listed_with_its_result(short):
    one = run_list.entry(short)
    last = [record for record in records_of(short) if record["kind"] == "eval"][-1]
    assert (one["state"], one["name"], one["phase"], one["accuracy"]) == ("finished", "digits", "finetune", last["accuracy"])
    assert (one["step"], one["phase_steps"]) == (4, 4) and 0 < one["macs_ratio"] < 1 and one["images_per_second"] > 0
    assert 0 <= one["checkpoint_age"] < 3600 and one["record_age"] >= 0 and "job" not in one
    assert "eta" not in one and "run_eta_seconds" in [record for record in records_of(short) if record["kind"] == "train"][-1]


def test_a_stopped_run_is_listed_as_resumable(train_here, digits, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    late = ("phases.pretrain.steps=3", "tracking.log_every=100")
    assert train_here(*arguments(digits, run, *SHORT, *late)).code == 75
    one = run_list.entry(run)
    assert one["state"] == "stopped" and one["phase"] == "pretrain" and "checkpoint_age" in one
    (stop,) = [record for record in records_of(run) if record["kind"] == "stop"]
    # It came before the first train record.
    assert not any(record["kind"] == "train" for record in records_of(run)) and one["step"] == stop["step"] >= 1
    (run / "stop").unlink(missing_ok=True)
    # Started again and killed: its last start has no stop behind it.
    records = records_of(run)
    start = next(record for record in records if record["kind"] == "start")
    rewrite(run, [*records, start | {"resumed": True}])
    assert run_list.entry(run)["state"] == "killed"


def test_a_run_killed_in_its_search_is_listed_as_killed(short):
    records = records_of(short)
    last = max(i for i, record in enumerate(records) if record["kind"] == "train" and record["phase"] == "search")
    rewrite(short, records[: last + 1])
    one = run_list.entry(short)
    full = records_of(short)[0]["full"]["exact"]["macs"]
    expected = [record["expected_macs"] for record in records_of(short) if "expected_macs" in record][-1]
    assert (one["state"], one["phase"], one["step"], one["phase_steps"]) == ("killed", "search", 4, 4)
    assert one["macs_ratio"] == expected / full


def test_a_running_run_is_known_by_its_lock_which_is_not_taken(short):
    cut(short, "end")
    before = {path: path.stat().st_mtime_ns for path in (short, *short.rglob("*"))}
    with FileLock(short / ".lock"):
        assert occupied(short) is True and run_list.entry(short)["state"] == "running"
    assert occupied(short) is False and run_list.entry(short)["state"] == "killed"
    (short / ".lock").unlink()
    assert occupied(short) is False and not (short / ".lock").exists()
    assert {path: stamp for path, stamp in before.items() if path.name not in (".lock", "short")}.items() <= {
        path: path.stat().st_mtime_ns for path in short.rglob("*")
    }.items()


def test_on_another_machines_disk_the_last_record_decides(short, monkeypatch):
    """A lock that is held elsewhere may not be seen."""
    monkeypatch.setattr(lock, "file_system", lambda folder: "nfs4")
    cut(short, "end")
    assert occupied(short) is None
    records = [record | ({"host": "elsewhere"} if record["kind"] == "start" else {}) for record in records_of(short)]
    rewrite(short, [*records[:-1], records[-1] | {"time": time.time() - 60}])
    assert run_list.entry(short)["state"] == "seems to run"
    rewrite(short, [*records[:-1], records[-1] | {"time": time.time() - 2 * run_list.SILENT}])
    assert run_list.entry(short)["state"] == "killed"
    # This machine's own locks are seen in any case.
    records[0] |= {"host": socket.gethostname()}
    rewrite(short, [*records[:-1], records[-1] | {"time": time.time() - 60}])
    assert run_list.entry(short)["state"] == "killed"


def test_file_systems_are_distinguished(tmp_path):
    assert occupation.file_system(Path("/proc/self")) == "proc"
    assert occupation.file_system(tmp_path) not in ("", "proc")


@pytest.mark.parametrize(("most", "state"), [(10**9, "finished"), (1, "missed")])
def test_a_missed_target_is_listed(short, most, state):
    budget = {"unit": "macs", "least": 0, "most": most, "full": 10**9}
    rewrite(short, [record | ({"budget": budget} if record["kind"] == "prune" else {}) for record in records_of(short)])
    assert run_list.entry(short)["state"] == state


BROKEN = {
    "no record": (b"", "holds no record yet"),
    "lines that are no objects": (b"[1]\n3\n", "none of its 2 lines is a record"),
    "no text": (bytes(range(256)) * 2, "none of its"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_folder_is_listed_and_hides_no_other(tmp_path, short, kind):
    content, why = BROKEN[kind]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_bytes(content)
    found = {Path(one["run"]).name: one for one in run_list.listed(tmp_path)}
    assert found["a"]["state"] == "broken" and found["a"]["why"] and why in found["a"]["why"]
    assert found["short"]["state"] == "finished"


def test_runs_are_found_three_folders_deep_and_not_within_others(tmp_path, short):
    for place in ("sweep/a", "sweep/deep/b", "too/deep/for/it"):
        shutil.copytree(short, tmp_path / place)
    shutil.copytree(tmp_path / "sweep" / "a", short / "compact" / "inner")
    (tmp_path / "sweep" / "submit").mkdir()
    (tmp_path / "sweep" / "submit" / "jobs.jsonl").write_text('{"job": "7", "time": 1}\n')
    found = [str(path.relative_to(tmp_path)) for path in run_list.found_in(tmp_path)]
    assert found == ["short", "sweep/a", "sweep/deep/b"]
    assert list(run_list.found_in(short)) == [short]


def test_jobs_in_slurms_queue_are_listed(tmp_path, short, monkeypatch):
    """squeue's part is played by a script."""
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho '12|12|PENDING'\necho '20|20_3|RUNNING'\necho '21|21|PENDING'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    submit(tmp_path / "new", "12")
    submit(tmp_path / "begins", "20_3")
    submit(tmp_path / "gone", "99")
    cut(short, "end")
    submit(short, "21")
    found = {Path(one["run"]).name: one for one in run_list.listed(tmp_path)}
    assert {name: one["state"] for name, one in found.items()} == {
        "new": "queued",
        "begins": "running",
        "gone": "broken",
        "short": "queued",
    }
    assert found["new"]["job"] == "12" and found["short"]["job_state"] == "PENDING" and "job 99" in found["gone"]["why"]
    # A chain: the newest waits for the one that is at work.
    with (short / "submit" / "jobs.jsonl").open("a") as lines:
        lines.write('{"job": "20_3", "time": 3}\n{"job": "12", "time": 4}\n')
    one = {Path(one["run"]).name: one for one in run_list.listed(tmp_path)}["short"]
    assert (one["state"], one["job"], one["job_state"]) == ("running", "20_3", "RUNNING")
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(run_list, "ANSWER", 0.2)
    assert run_list.queue() is None and run_list.listed(tmp_path)[0]["state"] == "killed"


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dnal_dist.runs", *map(str, words)], capture_output=True, text=True, timeout=60)


def test_the_list_in_a_pipe_is_plain_and_uncut(tmp_path, short):
    name = "a-rather-long-name-of-a-run-" * 5
    shutil.copytree(short, tmp_path / name)
    cut(short, "end")
    ended = command(tmp_path)
    head, first, second = ended.stdout.splitlines()
    assert ended.returncode == 0 and re.split(" {2,}", head) == runs.HEAD
    assert first.startswith("short ") and "crashed or killed, goes on by the same command" in first and " 4/4 " in first
    assert second.startswith(name) and "finished" in second and not ended.stderr
    assert " s ago" in first and "ago" not in second
    assert [one["state"] for one in json.loads(command(tmp_path, "--json").stdout)] == ["killed", "finished"]


def test_the_place_of_warnings_is_printed_once(tmp_path, short):
    records = records_of(short)
    rewrite(short, [*records, {"kind": "warning", "time": records[-1]["time"], "global_step": 12, "message": "a word"}])
    shutil.copytree(short, tmp_path / "other")
    _, *rows, last = command(tmp_path).stdout.splitlines()
    assert len(rows) == 2 and all(row.endswith("  1") for row in rows) and last == runs.WARNINGS


def test_a_pipe_that_is_closed_early_is_no_fault(tmp_path, short):
    """As by head."""
    for words in ((), ("--json",)):
        end, begin = os.pipe()
        os.close(end)
        ended = subprocess.run([sys.executable, "-m", "dnal_dist.runs", tmp_path, *words], stdout=begin, stderr=subprocess.PIPE)
        os.close(begin)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_folders_without_runs_are_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    ended = command(tmp_path / "empty")
    assert ended.returncode == 0 and "no run in it" in ended.stdout
    ended = command(tmp_path / "none")
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_the_list_imports_nothing_slow():
    slow = {"torch", "safetensors", "matplotlib", "jinja2", "pydantic"}
    code = f"import sys; import dnal_dist.runs; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
