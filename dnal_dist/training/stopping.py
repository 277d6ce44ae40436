"""Polite stops: signals, a file, a time limit; and the moments at which all processes look at them together."""

import os
import re
import signal
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import torch

from dnal_dist.common import commands
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context

# Exit code of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds between two looks. Each is a collective, and on a GPU the only moment at which the host waits for the device.
LOOK_EVERY = 1.0
# Seconds after a signal in which a process that does not come to an edge any more leaves all the same.
PATIENCE = 120.0
# A second Ctrl-C after so many seconds means "at once". The launcher passes the first one on, too.
IMPATIENT = 1.0


class Stopped(Exception):
    """All processes have agreed to stop here."""


class Signals:
    """What to do about SIGTERM, SIGINT and SIGUSR1: before training, leave at once (`interrupt` is called); in it, at an edge."""

    def __init__(self, interrupt):
        self.interrupt, self.training, self.impatient = interrupt, False, False
        self.asked: signal.Signals | None = None
        self._since = 0.0
        for number in SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number, _frame) -> None:
        again = number == signal.SIGINT and self.asked is not None and time.monotonic() - self._since > IMPATIENT
        if not self.training or again:
            self.asked, self.impatient = signal.Signals(number), again
            self.interrupt()
        elif self.asked is None:
            self.asked, self._since = signal.Signals(number), time.monotonic()
            patience = threading.Timer(PATIENCE, os._exit, [STOPPED])
            patience.daemon = True
            patience.start()


class Edges:
    """Where a run looks, between two steps or two batches of an evaluation, whether it is to stop or to save.

    until: when the run has to be over, in seconds since 1970; leaving: seconds that its end may take beside a checkpoint. The
    time, the stop file and the time for a checkpoint are the main
    process's affair; signals and the loss of the launcher are everybody's.
    """

    def __init__(
        self,
        context: Context,
        signals: Signals | None = None,
        stop_file: Path | None = None,
        until: float | None = None,
        leaving: float = 0.0,
    ):
        self.context, self.signals, self.stop_file, self.until, self.leaving = context, signals, stop_file, until, leaving
        # A shell that is left behind is no reason to stop; a launcher that is gone cannot end the others any more.
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self.parent = os.getppid() if launched else None
        self.every = self.left = 1
        """Edges between two looks, and those up to the next."""
        self.since, self.longest = time.monotonic(), 0.0

    def look(self, save: bool = False, needs: float = 0.0) -> bool:
        """Whether to save here. All processes come here equally often, and get the same answer; Stopped is raised on all of them if
        one was asked to stop. On the main process: save, whether it is time for a checkpoint; needs, seconds that one takes."""
        self.left -= 1
        if self.left > 0:
            return False
        passed = time.monotonic() - self.since
        self.longest = max(passed, 0.95 * self.longest)
        found = torch.zeros(6, dtype=torch.float64)
        reasons = self._reasons(2 * needs + 2 * self.longest + 5.0 + self.leaving)
        found[: len(reasons)] = torch.tensor([bool(reason) for reason in reasons])
        if self.context.main:
            found[4:] = torch.tensor([save, self._next(passed)])
        if self.context.world_size > 1:
            found = self.context.sum_(found.to(self.context.device))
        *asked, save, every = found.tolist()
        self.every = self.left = int(every)
        self.since = time.monotonic()
        if any(asked):
            known = [reason for reason in reasons if reason]
            others = ("a signal", "the launcher is gone", "the stop file", "the time limit")
            raise Stopped(known[0] if known else next(name for name, on in zip(others, asked, strict=True) if on))
        return bool(save)

    def _reasons(self, margin: float) -> list[str]:
        """What this process knows of reasons to stop, of each kind; empty if nothing."""
        asked = self.signals and self.signals.asked
        found = [asked.name if asked else "", "", "", ""]
        if self.parent is not None and os.getppid() != self.parent:
            found[1] = "the launcher is gone"
        if self.context.main and self.stop_file is not None and os.path.exists(self.stop_file):
            found[2] = f"{self.stop_file} is there"
        if self.context.main and self.until is not None and time.time() > self.until - margin:
            found[3] = f"{max(0.0, self.until - time.time()):.0f} s are left of the time limit"
        return found

    def _next(self, passed: float) -> int:
        """After how many edges to look again. Where no other process is waited for, all a look costs is to ask for a file."""
        seconds = LOOK_EVERY if self.context.world_size > 1 else LOOK_EVERY / 20
        return max(1, min(2 * self.every, int(self.every * seconds / max(passed, 1e-6))))


def duration(text: str) -> float:
    """Seconds, of 3h30m, 90m, 1d, 45s or SLURM's 3:30:00 and 1-12:00:00. Raises ValueError for anything else."""
    if (found := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())) or (
        found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    ):
        parts = found.groups()
    else:
        parts = ()
    seconds = sum(int(part or 0) * unit for part, unit in zip(parts, (86_400, 3_600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"expected a time such as 3h30m, 90m, 1d or 3:30:00, found {text!r}")
    return float(seconds)


def end_of_job() -> float | None:
    """When SLURM will end the job that this process belongs to, in seconds since 1970; None if there is no job or no end."""
    if told := os.environ.get("SLURM_JOB_END_TIME", ""):
        return float(told) if told.isdecimal() else None
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        return datetime.fromisoformat(commands.output_of(command, 20) or "").timestamp()
    except ValueError:
        return None


def limit(max_time: str | None) -> float | None:
    """When the run has to be over, in seconds since 1970: the sooner of `max_time` after this process began and the end of its
    SLURM job. Raises InputError for a time that is none."""
    try:
        own = None if max_time is None else psutil.Process().create_time() + duration(max_time)
    except ValueError as error:
        raise InputError(f"--max-time: {error}") from None
    return min((end for end in (own, end_of_job()) if end is not None), default=None)
