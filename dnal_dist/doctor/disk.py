"""Checks of the run folder and its disk. All that is written is taken away again, and nothing is put among a run's own files."""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from shutil import disk_usage

import torch

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint, Kept, State
from dnal_dist.common.lock import occupied
from dnal_dist.common.text import duration, short
from dnal_dist.doctor.case import Case, Finding, fails, output_of, passes, warns
from dnal_dist.training import stopping
from dnal_dist.training.run_folder import ANEW, look

# Seconds by which two clocks may differ before files of the one look wrong on the other.
CLOCKS = 2.0
# Share of the time between two checkpoints that writing one may take; they would wait for each other.
BUSY = 0.5
# Bytes that are written to measure it.
MEASURED = 256 << 20
# What slurm/train.sbatch writes into the stop file for itself; it takes away what it left behind.
SCRIPTS = "asked for by job"
# Of the grace of a job, what its script keeps to come to its own end: seconds, but no more than this share.
KEPT, PART = 30.0, 0.25
# Seconds that importing, reading the index and joining the processes may take before a run takes its first step.
START = 120.0


def run_folder(case: Case) -> Finding:
    folder = case.folder
    if folder.exists() and not folder.is_dir():
        return fails(f"{folder} is not a folder", "name another key 'output'")
    try:
        # Without a name where the system has that: nothing is seen of it, and the folder's own time stays.
        with tempfile.TemporaryFile(dir=case.place) as file:
            file.write(b"dnal_dist")
            file.flush()
    except OSError as error:
        return fails(f"{case.place}: cannot be written ({error.strerror})", "name another key 'output', or mend its permissions")
    if _stops(folder):
        return fails(f"{folder / 'stop'} is there, so a run would stop at its first step", f"rm {folder / 'stop'}")
    taken = occupied(folder)
    saved, faults = look(folder, case.settings)
    if taken:
        return fails(f"another process trains in {folder}", "wait for its end, or name another key 'output'")
    unknown = ", though one on another machine may train there" if taken is None else ""
    if saved is None:
        if faults:
            return warns(faults[0] + unknown, "nothing, or name another key 'output' to keep it")
        return passes(f"{folder} can be written, and a run begins there{unknown}")
    state = saved.state
    if state.phase == "done":
        return warns(f"{folder} holds this run, finished{unknown}", f"to train it anew, {ANEW}")
    told = f"{folder} holds this run, which goes on in {state.phase} after {state.step} of its steps{unknown}"
    return warns(f"{told}; {faults[0]}", "see what damages files on this disk") if faults else passes(told)


def _stops(folder: Path) -> bool:
    """Whether a file there would stop a run."""
    try:
        with (folder / "stop").open(errors="replace") as file:
            return not file.read(len(SCRIPTS)).startswith(SCRIPTS)
    except OSError:
        return (folder / "stop").exists()


def disk(case: Case) -> Finding:
    """Room for checkpoints, as many as there are at a time."""
    keep = case.settings.checkpoint.keep
    number = keep.last + keep.best + 1
    there = sum(path.stat().st_size for path in case.folder.glob("checkpoints/*/*") if path.is_file())
    free = disk_usage(case.place).free
    needed = number * case.tensor_bytes
    told = f"checkpoints take up to {short(needed)} ({number} of {short(case.tensor_bytes)}), {short(free)} are free"
    if free + there < needed:
        return fails(told, "make room, name another key 'output', or lower keys 'checkpoint.keep.last' and 'checkpoint.keep.best'")
    return passes(told)


def saving(case: Case) -> Finding:
    """A checkpoint of the run's size, up to MEASURED, is written beside the run folder and held against the time that there is."""
    if case.quick:
        return passes("not measured, by --quick")
    if disk_usage(case.place).free < 2 * case.tensor_bytes:
        return fails("not measured, since there is no room for two checkpoints", "make room, or name another key 'output'")
    # Beside rather than in it, where that is the same disk.
    parent = case.place.parent
    beside = os.access(parent, os.W_OK) and parent.stat().st_dev == case.place.stat().st_dev
    place, written = case.folder_in(parent if beside else case.place), _like(case)
    try:
        begun = time.monotonic()
        size = checkpoint.write(place / "checkpoints", written, Kept(1, 0))
        seconds = time.monotonic() - begun
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if size > 0.9 * case.tensor_bytes:
        return _judged(case, seconds, f"one of {short(size)} took {seconds:.2f} s to write and to read back")
    told = f"{short(size)} of a checkpoint's {short(case.tensor_bytes)} took {seconds:.2f} s to write and to read back"
    return _judged(case, seconds * case.tensor_bytes / size, told)


def _like(case: Case) -> Checkpoint:
    """One of the search, or as much of it as is written in time, of numbers that no file system can make smaller."""
    tensors, size = {"alpha": torch.rand(case.network.num_gates)}, 0
    for name, p in case.network.named_parameters():
        for part in ("network", "momentum"):
            rows = max(1, min(len(p), (MEASURED - size) * len(p) // (4 * p.numel())))
            tensors[f"{part}.{name}"] = torch.rand(p.shape)[:rows]
            size += 4 * tensors[f"{part}.{name}"].numel()
    state = State(phase="search", step=1, global_step=1, recipe=case.settings.model_dump(mode="json"))
    return Checkpoint(tensors, state)


def limit_of(case: Case) -> float | None:
    """Seconds that the job has: as asked for, else what is left of the SLURM job that this is."""
    end = stopping.end_of_job() if case.seconds is None else None
    return case.seconds if end is None else max(0.0, end - time.time())


def _judged(case: Case, seconds: float, told: str) -> Finding:
    """seconds: that one checkpoint takes."""
    settings, limit = case.settings.checkpoint, limit_of(case)
    # What stopping.Edges leaves of the time for the last one, and as much as a run needs to begin.
    saved = 2 * seconds + 5
    needed = START + saved
    every = None if settings.every_minutes is None else 60 * settings.every_minutes
    if limit is not None:
        told += f", the time limit is {duration(limit)}"
        if limit < needed:
            return fails(f"{told}: too little to start, train and save", f"--time of more than {duration(2 * needed)}")
        if every is not None and every > limit / 2:
            return warns(
                f"{told}; a job that is killed without warning loses up to {settings.every_minutes:g} minutes",
                f"checkpoint.every_minutes={max(1, int(limit / 600))}",
            )
    if case.grace is not None and case.grace - min(KEPT, PART * case.grace) < saved:
        return fails(
            f"{told}, and a job that is told to save is ended {duration(case.grace)} later: too little to save in, if one is being "
            "written already",
            f"--grace {math.ceil(saved + KEPT)}, or a faster disk by key 'output'",
        )
    if every is not None and seconds > BUSY * every:
        return warns(
            f"{told}, and there is one every {settings.every_minutes:g} minutes",
            f"checkpoint.every_minutes={max(1, round(seconds / 6))}, or a faster disk by key 'output'",
        )
    if every is None and settings.every_steps is None:
        return warns(f"{told}; a kill loses up to an epoch", "set key 'checkpoint.every_minutes'")
    return passes(told)


def clock(case: Case) -> Finding:
    """This machine's clock against that of the run folder's file system, and what keeps it right."""
    before = time.time()
    with tempfile.TemporaryFile(dir=case.place) as file:
        file.write(b"dnal_dist")
        file.flush()
        os.fsync(file.fileno())
        written, after = os.fstat(file.fileno()).st_mtime, time.time()
    # Time of the kernel's last tick, which may lie a hundredth of a second back.
    off = max(before - 0.05 - written, written - after, 0.0)
    synchronised = output_of(["timedatectl", "show", "--property=NTPSynchronized", "--value"], 3)
    agrees = "agrees with" if off <= CLOCKS else f"differs by {off:.1f} s from"
    told = f"this machine's clock {agrees} that of the file system of {case.place}"
    if off > CLOCKS:
        return warns(told, "set the clock of this machine by NTP (chrony, systemd-timesyncd): ages and time limits are wrong")
    if synchronised == "no":
        return warns(f"{told}, but not kept by NTP", "timedatectl set-ntp true")
    return passes(told + {"yes": ", kept by NTP"}.get(synchronised or "", "; whether NTP keeps it is not told here"))
