"""The runs in a folder: which go on, which stopped or were killed, and what each has come to. No torch.

python -m dnal_dist.runs runs             those in runs/, in sweeps too: three folders deep
python -m dnal_dist.runs runs --watch     again every few seconds
python -m dnal_dist.runs runs --json      for programs
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dnal_dist import results
from dnal_dist.common import text
from dnal_dist.common.lock import occupied

DEPTH = 3
# Seconds between two looks of --watch, and in which squeue has to answer.
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
COLOURS = {"running": "green", "seems to run": "green", "queued": "cyan", "stopped": "yellow", "killed": "red", "broken": "red"}


def found_in(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run folders in `folder` and below, itself too; nothing is looked for inside of a run."""
    if (folder / "metrics.jsonl").exists():
        yield folder
        return
    inner = []
    if depth:
        with contextlib.suppress(OSError):
            inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    below = [run for name in inner for run in found_in(folder / name, depth - 1)]
    yield from below
    # A run that was only submitted so far; not a sweep, which has its runs below.
    if not below and (folder / "submit" / "jobs.jsonl").exists():
        yield folder


def jobs_of(folder: Path) -> list[str]:
    """SLURM's numbers of the jobs that were submitted for a run, the newest last."""
    found = []
    with contextlib.suppress(OSError):
        for line in (folder / "submit" / "jobs.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                found.append(str(json.loads(line)["job"]))
    return found


def queue() -> dict[str, str] | None:
    """SLURM's state of each job of this user, by its number (of an array 123 as well as 123_4); None if that cannot be known."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--me", "--array", "--format=%F|%i|%T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = {}
    for line in told.splitlines():
        array, job, state = [*line.strip().split("|"), "", ""][:3]
        # Of an array that waits in part, some other task's state is known too.
        found.setdefault(array, state)
        found[job] = state
    return found


def told(folder: Path, queued: dict[str, str] | None = None) -> dict:
    """What a run folder tells of its run, as JSON; a key whose value is not known is absent. Never raises for what is in there.

    run, name, state, phase, step, phase_steps, accuracy (of the last evaluation), macs_ratio (of the full network's multiply-adds;
    expected ones while the search goes on), images_per_second, checkpoint_age and record_age (seconds), warnings (how many), job
    and job_state (SLURM's), why (it is broken). queued: see queue.
    """
    facts = {"run": str(folder), "name": folder.resolve().name}
    job, there = _job(folder, queued or {})
    facts |= {"job": job, "job_state": there}
    try:
        run = results.load(folder)
        facts |= _progress(run) | {"state": _state(run, there)}
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        state = facts["state"] = "running" if there in BUSY or occupied(folder) else "queued" if there in WAITS else "broken"
        if state == "broken":
            facts["why"] = text.printable(" ".join(str(error).split())) or type(error).__name__
            if job and not (folder / "metrics.jsonl").exists():
                facts["why"] = f"job {job} was submitted, but has left no record and is not in the queue: see its log"
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


def _progress(run: results.Run) -> dict:
    summary, train, last = results.summary(run), run.last("train"), run.records[-1]
    phase = summary.get("phase")
    # A checkpoint tells the phase that begins with it; behind the last there is none.
    phase = train.get("phase") if phase == "done" else phase
    # Of a run that was stopped between two train records, or before the first, the stop tells how far it came.
    here = max((r for r in (train, run.last("stop")) if r.get("phase") == phase), key=lambda r: r.get("step", 0), default={})
    ratio = summary.get("macs_ratio")
    full = summary.get("full", {}).get("exact", {}).get("macs")
    if ratio is None and full and train.get("expected_macs") is not None:
        ratio = train["expected_macs"] / full
    return {
        "name": run.name,
        "phase": phase,
        "step": here.get("step"),
        "phase_steps": train.get("phase_steps") if train.get("phase") == phase else None,
        "accuracy": run.last("eval").get("accuracy"),
        "macs_ratio": ratio,
        "images_per_second": train.get("images_per_second"),
        "record_age": round(max(0.0, time.time() - last["time"]), 1) if "time" in last else None,
        "warnings": len(summary.get("warnings", ())),
    }


def _state(run: results.Run, job: str | None) -> str:
    """job: SLURM's state of it."""
    taken = occupied(run.folder)
    if taken or (job in BUSY and not run.last("end")):
        return "running"
    if run.last("end"):
        return "missed" if _missed(run) else "finished"
    if job in WAITS:
        return "queued"
    if taken is None and run.last("start").get("host") not in (socket.gethostname(), socket.getfqdn()):
        # A lock that is held on another machine may not be seen here: what is left is how long nothing was heard.
        stopped, age = _stopped(run), time.time() - run.records[-1].get("time", 0)
        return "stopped" if stopped else "seems to run" if age < SILENT else "killed"
    return "stopped" if _stopped(run) else "killed"


def _stopped(run: results.Run) -> bool:
    """Whether it was asked to, since it was last started."""
    return next((r["kind"] == "stop" for r in reversed(run.records) if r.get("kind") in ("start", "stop")), False)


def _missed(run: results.Run) -> bool:
    prune = run.last("prune")
    asked = prune.get("budget")
    used = prune.get("compact", {}).get("exact", {}).get(asked["unit"]) if asked else None
    return used is not None and not asked.get("least", 0) <= used <= asked["most"]


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
    return sorted((told(place, queued) for place in places), key=lambda one: (order.index(one["state"]), one["run"]))


def cells(one: dict, folder: Path) -> list[str]:
    """A run's line of the table."""
    run = Path(one["run"])
    where = str(run.relative_to(folder)) if run != folder else str(run)
    step = f"{one['step']}/{one.get('phase_steps', '?')}" if "step" in one else ""
    state = STATES[one["state"]] + (f": {one['why']}" if "why" in one else "")
    if "job" in one and one["state"] in ("running", "queued", "seems to run"):
        state += f" (job {one['job']})"
    done = one["state"] in ("finished", "missed")
    return [
        text.printable(where),
        text.printable(state),
        str(one.get("phase", "")) if not done else "",
        step if not done else "",
        text.percent(one["accuracy"], 2) if "accuracy" in one else "",
        text.percent(one["macs_ratio"]) if "macs_ratio" in one else "",
        text.number(one["images_per_second"]) if "images_per_second" in one else "",
        f"{text.duration(one['checkpoint_age'])} ago" if "checkpoint_age" in one and not done else "",
        str(one.get("warnings") or ""),
    ]


HEAD = ["run", "state", "phase", "step", "accuracy", "macs", "images/s", "last saved", "warnings"]
WARNINGS = 'warnings: in a run\'s report.html, or grep \'"kind": "warning"\' RUN/metrics.jsonl'


def _tell(folder: Path, found: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, lines = Console(), [cells(one, folder) for one in found]
    if not console.is_terminal:
        # Uncut, whatever the width: for pipes.
        widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]
        for line in [HEAD, *lines]:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        if any(one.get("warnings") for one in found):
            print(WARNINGS)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        table.add_column(name, justify="left" if name in HEAD[:3] else "right", overflow="fold")
    for one, (run, state, *others) in zip(found, lines, strict=True):
        table.add_row(Text(run), Text(state, COLOURS.get(one["state"], "")), *map(Text, others))
    console.print(table)
    if any(one.get("warnings") for one in found):
        console.print(Text(WARNINGS, "dim"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.runs",
        description=__doc__,
        epilog="states: "
        + "; ".join(STATES.values())
        + ". A run seems to run if its disk is shared with other machines, where its "
        f"lock may not be seen, and its last record is younger than {SILENT / 60:.0f} minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for example runs")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--watch", action="store_true", help=f"look again every {EVERY:.0f} s, until Ctrl-C")
    args = parser.parse_args()
    # A name that the terminal's encoding lacks is no reason to fail.
    sys.stdout.reconfigure(errors="replace")
    if not args.folder.is_dir():
        print(f"error: {args.folder}: no such folder; give the one that runs are in, such as runs", file=sys.stderr)
        sys.exit(2)
    try:
        while True:
            found = listed(args.folder)
            if args.watch and sys.stdout.isatty():
                print("\033[H\033[J", end="")
            if args.json:
                print(json.dumps(found, indent=None if args.watch else 1))
            elif found:
                _tell(args.folder, found)
            else:
                print(f"{args.folder}: no run in it, nor {DEPTH} folders deep")
            sys.stdout.flush()
            if not args.watch:
                return
            time.sleep(EVERY)
    except (KeyboardInterrupt, BrokenPipeError):
        # So that Python does not try to write what is left to a pipe that nobody reads.
        os._exit(0)


if __name__ == "__main__":
    main()
