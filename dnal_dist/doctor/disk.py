"""Checks of the run folder and its disk. Everything written for a check is removed, and nothing is put among a run's own files."""

import math
import os
import tempfile
import time
from shutil import disk_usage

import torch

from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint, RunState
from dnal_dist.common.lock import occupied
from dnal_dist.common.text import duration, short
from dnal_dist.doctor.case import Case, Finding, fails, passes, warns
from dnal_dist.recipe import Keep
from dnal_dist.training import stopping
from dnal_dist.training.run_folder import REMEDY, inspect

# Fraction of the time between two checkpoints that writing one may take.
BUSY = 0.5
# Bytes that are written to measure the disk.
MEASURED = 256 << 20
# What slurm/train.sbatch writes into the stop file; it removes a file that begins so.
SCRIPTS = "asked for by job"
# What slurm/train.sbatch keeps of the grace for its own end: seconds, but no more than this fraction.
KEPT, FRACTION = 30.0, 0.25
# Seconds from the start of the processes to the first step: imports, reading the index, joining.
START = 120.0


def run_folder(case: Case) -> Finding:
    folder, stop = case.folder, case.folder / "stop"
    if folder.exists() and not folder.is_dir():
        return fails(f"{folder} is not a folder", "change key 'output'")
    try:
        # It has no name where the system allows that, so the folder does not change.
        with tempfile.TemporaryFile(dir=case.existing) as file:
            file.write(b"dnal_dist")
    except OSError as error:
        return fails(f"{case.existing}: cannot be written ({error.strerror})", "change key 'output', or the permissions")
    if stop.exists() and not (stop.is_file() and stop.read_text(errors="replace").startswith(SCRIPTS)):
        return fails(f"{stop} exists, so a run would stop at its first step", f"rm {stop}")
    taken = occupied(folder)
    saved, faults = inspect(folder, case.settings)
    if taken:
        return fails(f"another process trains in {folder}", "wait for its end, or change key 'output'")
    unknown = ", though a process on another machine may train there" if taken is None else ""
    if saved is None:
        if faults:
            return warns(faults[0] + unknown, "nothing, or change key 'output' to keep it")
        return passes(f"{folder} can be written, and a run starts there{unknown}")
    state = saved.state
    if state.phase == "done":
        return warns(f"{folder} holds this run, finished{unknown}", f"to train it again, {REMEDY}")
    found = f"{folder} holds this run, which resumes in {state.phase} after {state.step} of its steps{unknown}"
    return warns(f"{found}; {faults[0]}", "find out what damages files on this disk") if faults else passes(found)


def disk(case: Case) -> Finding:
    """Room for as many checkpoints as exist at a time."""
    keep = case.settings.checkpoint.keep
    # Beside those: pretrain's, and the one that is being written.
    number = keep.last + keep.best + 2
    there = sum(path.stat().st_size for path in case.folder.glob("checkpoints/*/*") if path.is_file())
    free, needed = disk_usage(case.existing).free, number * case.checkpoint_bytes
    found = f"checkpoints take up to {short(needed)} ({number} of {short(case.checkpoint_bytes)}), {short(free)} are free"
    if free + there < needed:
        return fails(found, "make room, change key 'output', or lower keys 'checkpoint.keep.last' and 'checkpoint.keep.best'")
    return passes(found)


def saving(case: Case) -> Finding:
    """Write a checkpoint of the run's size, up to MEASURED, beside the run folder, and compare its time with the job's limits."""
    if case.quick:
        return passes("not measured, by --quick")
    if disk_usage(case.existing).free < 2 * case.checkpoint_bytes:
        return fails("not measured, since there is no room for two checkpoints", "make room, or change key 'output'")
    # Beside rather than in it, where that is the same disk.
    parent = case.existing.parent
    beside = os.access(parent, os.W_OK) and parent.stat().st_dev == case.existing.stat().st_dev
    folder = case.folder_in(parent if beside else case.existing)
    state = RunState(phase="search", step=1, global_step=1, recipe=case.settings.model_dump(mode="json"))
    # Random numbers, which no file system can compress.
    sample = Checkpoint({"sample": torch.rand(min(case.checkpoint_bytes, MEASURED) // 4)}, state)
    begun = time.monotonic()
    size = checkpoint.write(folder / "checkpoints", sample, Keep(last=1, best=0))
    seconds = time.monotonic() - begun
    whole = size > 0.9 * case.checkpoint_bytes
    which = f"one of {short(size)}" if whole else f"{short(size)} of a checkpoint's {short(case.checkpoint_bytes)}"
    found = f"{which} took {seconds:.2f} s to write and to read back"
    return within_limits(case, seconds if whole else seconds * case.checkpoint_bytes / size, found)


def within_limits(case: Case, seconds: float, found: str) -> Finding:
    """Whether a checkpoint that takes `seconds` fits into the time limit, the grace and the time between two. found: the
    measurement, in words."""
    settings, limit = case.settings.checkpoint, case.seconds
    if limit is None and (end := stopping.end_of_job()) is not None:
        limit = max(0.0, end - time.time())
    # The time that training.stopping keeps for the last checkpoint, and the start of a run.
    saved = 2 * seconds + 5
    needed = START + saved
    every = None if settings.every_minutes is None else 60 * settings.every_minutes
    if limit is not None:
        found += f", the time limit is {duration(limit)}"
        if limit < needed:
            return fails(f"{found}: too little to start, train and save", f"--time of more than {duration(2 * needed)}")
        if every is not None and every > limit / 2:
            return warns(
                f"{found}; a job that is killed without warning loses up to {settings.every_minutes:g} minutes",
                f"checkpoint.every_minutes={max(1, int(limit / 600))}",
            )
    if case.grace is not None and case.grace - min(KEPT, FRACTION * case.grace) < saved:
        return fails(
            f"{found}, and a job ends {duration(case.grace)} after the signal to save: too little, if a checkpoint is being "
            "written already",
            f"--grace {math.ceil(saved + KEPT)}, or a faster disk by key 'output'",
        )
    if every is not None and seconds > BUSY * every:
        return warns(
            f"{found}, and there is one every {settings.every_minutes:g} minutes",
            f"checkpoint.every_minutes={max(1, round(seconds / 6))}, or a faster disk by key 'output'",
        )
    if every is None and settings.every_steps is None:
        return warns(f"{found}; a kill loses up to an epoch", "set key 'checkpoint.every_minutes'")
    return passes(found)
