"""The runs in a folder: state, progress, jobs."""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dnal_dist.common import commands, text
from dnal_dist.common.errors import InputError
from dnal_dist.common.files import read_regular
from dnal_dist.common.lock import occupied
from dnal_dist.report import records

DEPTH = 3
# Seconds between two polls of --watch, and in which squeue has to answer.
EVERY, ANSWER = 5.0, 3.0
# Seconds without a record after which a run on another machine's disk does not seem to go on: twice the time between checkpoints.
SILENT = 1800.0
# In the order of the list: what goes on first.
STATES = {
    "running": "running",
    "seems to run": "seems to run",
    "queued": "queued",
    "stopped": "stopped, goes on by the same command",
    "killed": "crashed or killed, goes on by the same command",
    "finished": "finished",
    "missed": "finished, missed its target",
    "broken": "broken",
}
# SLURM's states of a job that has its nodes, and of one that will have them.
BUSY = ("RUNNING", "COMPLETING", "CONFIGURING")
WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


def found_in(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run folders in `folder` and below, itself too; not inside of a run."""
    if (folder / "metrics.jsonl").exists():
        yield folder
        return
    inner = []
    if depth:
        with contextlib.suppress(OSError):
            inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    below = [run for name in inner for run in found_in(folder / name, depth - 1)]
    yield from below
    # A run that was only submitted so far, or has no record yet; not a sweep, which has its runs below.
    if not below and any((folder / name).exists() for name in ("recipe.yaml", "submit/jobs.jsonl")):
        yield folder


def jobs_of(folder: Path) -> list[str]:
    """SLURM's numbers of the jobs that were submitted for a run, the newest last."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in read_regular(folder / "submit" / "jobs.jsonl", 1 << 20).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                found.append(text.printable(str(json.loads(line)["job"]))[:40])
    return found


def queue() -> dict[str, str] | None:
    """SLURM's state of each job of this user, by its number (of an array 123 as well as 123_4); None if that cannot be known."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--me", "--array", "--format=%F|%i|%T"]
    answer = commands.output_of(command, ANSWER)
    if answer is None:
        return None
    found = {}
    for line in answer.splitlines():
        array, job, state = [*line.strip().split("|"), "", ""][:3]
        # Of an array that waits in part, some other task's state is known too.
        found.setdefault(array, state)
        found[job] = state
    return found


def entry(folder: Path, queued: dict[str, str] | None = None) -> dict:
    """State and progress of a run, as JSON; a key whose value is not known is absent. Never raises for a folder's content.

    run, name, state, phase, step, phase_steps, accuracy (of the last evaluation), macs_ratio (of the full network's MACs;
    expected ones while the search goes on), images_per_second, eta (seconds until the end of a run that is at work),
    checkpoint_age and record_age (seconds), warnings (how many), job and job_state (SLURM's), why (it is broken). queued: see
    queue.
    """
    facts = {"run": str(folder), "name": folder.resolve().name}
    job, there = _job(folder, queued or {})
    facts |= {"job": job, "job_state": there}
    try:
        run = records.load(folder)
        facts |= _progress(run) | {"state": _state(run, there)}
        if facts["state"] not in ("running", "seems to run"):
            facts.pop("eta")
    except InputError as error:
        state = facts["state"] = "running" if there in BUSY or occupied(folder) else "queued" if there in WAITS else "broken"
        if state == "broken":
            facts["why"] = str(error)
            if job and not (folder / "metrics.jsonl").exists():
                facts["why"] = (
                    f"job {job} was submitted, but has left no record and is not in the queue: see its log, or that of the "
                    "pretrain it waited for"
                )
    if (saved := _saved(folder)) is not None:
        facts["checkpoint_age"] = round(max(0.0, time.time() - saved), 1)
    return {key: value for key, value in facts.items() if value is not None}


def _job(folder: Path, queued: dict[str, str]) -> tuple[str | None, str | None]:
    """The job of a run that is at work, else one that waits, else the newest; and its state. Of a chain, the last ones wait for the
    first."""
    jobs = jobs_of(folder)
    known = [job for states in (BUSY, WAITS) for job in jobs if queued.get(job) in states]
    job = next(iter([*known, *reversed(jobs)]), None)
    return job, queued.get(job) if job else None


def _progress(run: records.Run) -> dict:
    summary, train, last = records.summary(run), run.last("train"), run.records[-1]
    phase = summary.get("phase")
    # A checkpoint's phase is the one that begins with it; none begins after the last.
    phase = train.get("phase") if phase == "done" else phase
    # Of a run that was stopped between two train records, or before the first, the stop holds how far it came.
    here = max((r for r in (train, run.last("stop")) if r.get("phase") == phase), key=lambda r: r.get("step", 0), default={})
    ratio = summary.get("macs_ratio")
    full = summary.get("full", {}).get("exact", {}).get("macs")
    if ratio is None and full and "expected_macs" in train:
        ratio = train["expected_macs"] / full
    return {
        "name": run.name,
        "phase": phase,
        "step": here.get("step"),
        "phase_steps": train.get("phase_steps") if train.get("phase") == phase else None,
        "accuracy": run.last("eval").get("accuracy"),
        "macs_ratio": ratio,
        "images_per_second": train.get("images_per_second"),
        "eta": max(0.0, train["run_eta_seconds"] - (time.time() - train["time"])) if "run_eta_seconds" in train else None,
        "record_age": round(max(0.0, time.time() - last["time"]), 1) if "time" in last else None,
        "warnings": len(summary["warnings"]),
    }


def _state(run: records.Run, job: str | None) -> str:
    """job: SLURM's state of it."""
    taken = occupied(run.folder)
    if taken or (job in BUSY and not run.last("end")):
        return "running"
    if run.last("end"):
        return "missed" if records.summary(run).get("budget", {}).get("missed") else "finished"
    if job in WAITS:
        return "queued"
    if taken is None and run.last("start").get("host") not in (socket.gethostname(), socket.getfqdn()):
        # A lock that is held on another machine may not be seen here: what is left is how long nothing was heard.
        stopped, age = _stopped(run), time.time() - run.records[-1].get("time", 0)
        return "stopped" if stopped else "seems to run" if age < SILENT else "killed"
    return "stopped" if _stopped(run) else "killed"


def _stopped(run: records.Run) -> bool:
    """Whether it was asked to, since it was last started."""
    return next((r["kind"] == "stop" for r in reversed(run.records) if r["kind"] in ("start", "stop")), False)


def _saved(folder: Path) -> float | None:
    """When the newest whole checkpoint was written, in seconds since 1970."""
    found = []
    for manifest in folder.glob("checkpoints/step-*/manifest.json"):
        with contextlib.suppress(OSError):
            found.append(manifest.stat().st_mtime)
    return max(found, default=None)


def listed(folder: Path) -> list[dict]:
    """All runs in `folder`, sorted by state, then by path."""
    places = list(found_in(folder))
    # Asked at most once, and only for what was submitted.
    queued = queue() if any(jobs_of(place) for place in places) else None
    order = list(STATES)
    return sorted((entry(place, queued) for place in places), key=lambda one: (order.index(one["state"]), one["run"]))
