"""Stop requests: signals, a file, a time limit; polled by all processes together between two steps."""

import os
import re
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import torch

from dnal_dist.common import commands
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context

# Exit code after a stop request: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds between two polls. Each is a collective, and on a GPU the only moment at which the host waits for the device.
POLL_EVERY = 1.0
# Seconds after a signal at which a process exits even if it has not polled again.
PATIENCE = 120.0
# A second Ctrl-C after this many seconds means "at once": the launcher passes the first one on, too.
IMPATIENT = 1.0


class Stopped(Exception):
    """All processes have agreed to stop here."""


class Signals:
    """Handlers of SIGTERM, SIGINT and SIGUSR1: `interrupt` is called at once before training; in training a poll sees them."""

    def __init__(self, interrupt):
        self.interrupt, self.training, self.impatient = interrupt, False, False
        self.received: signal.Signals | None = None
        self._since = 0.0
        for number in SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number, _frame) -> None:
        again = number == signal.SIGINT and self.received is not None and time.monotonic() - self._since > IMPATIENT
        if not self.training or again:
            self.received, self.impatient = signal.Signals(number), again
            self.interrupt()
        elif self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            patience = threading.Timer(PATIENCE, os._exit, [STOPPED])
            patience.daemon = True
            patience.start()


class StopPoll:
    """Polls, between two steps or two batches of an evaluation, whether to stop or to save, and agrees on it with all processes.

    until: when the run has to be over, in seconds since 1970; leaving: seconds that its end may take beside a checkpoint. The main
    process checks the time, the stop file and the time for a checkpoint; every process checks its signals and its launcher.
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
        # A lost launcher can no longer end the other processes; a lost shell is no reason to stop.
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self.parent = os.getppid() if launched else None
        self.every = self.left = 1
        """Calls of poll() between two real polls, and those left until the next."""
        self.since, self.longest = time.monotonic(), 0.0

    def poll(self, save: bool = False, needs: float = 0.0, at_once: bool = False) -> bool:
        """Whether to save here, the same on all processes, which must call this equally often. Raises Stopped on all of them if one
        has a stop request. On the main process: save, whether a checkpoint is due; needs, seconds that one takes. at_once: a real
        poll, for calls that are seconds apart."""
        self.left -= 1
        if self.left > 0 and not at_once:
            return False
        passed = time.monotonic() - self.since
        self.longest = max(passed, 0.95 * self.longest)
        flags = torch.zeros(6, dtype=torch.float64)
        reasons = self._reasons(2 * needs + 2 * self.longest + 5.0 + self.leaving)
        flags[: len(reasons)] = torch.tensor([bool(reason) for reason in reasons])
        if self.context.main:
            flags[4:] = torch.tensor([save, self._next(passed)])
        if self.context.world_size > 1:
            flags = self.context.sum_(flags.to(self.context.device))
        *requests, save, every = flags.tolist()
        self.every = self.left = int(every)
        self.since = time.monotonic()
        if any(requests):
            known = [reason for reason in reasons if reason]
            others = ("a signal", "the launcher is gone", "the stop file", "the time limit")
            raise Stopped(known[0] if known else next(name for name, on in zip(others, requests, strict=True) if on))
        return bool(save)

    def _reasons(self, margin: float) -> list[str]:
        """This process's reason to stop of each kind; empty if there is none."""
        number = self.signals and self.signals.received
        reasons = [number.name if number else "", "", "", ""]
        if self.parent is not None and os.getppid() != self.parent:
            reasons[1] = "the launcher is gone"
        if self.context.main and self.stop_file is not None and os.path.exists(self.stop_file):
            reasons[2] = f"{self.stop_file} is there"
        if self.context.main and self.until is not None and time.time() > self.until - margin:
            reasons[3] = f"{max(0.0, self.until - time.time()):.0f} s are left of the time limit (--max-time, or the SLURM job)"
        return reasons

    def _next(self, passed: float) -> int:
        """Calls until the next real poll. A single process waits for no other, so its poll costs no more than a file check."""
        seconds = POLL_EVERY if self.context.world_size > 1 else POLL_EVERY / 20
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
    if end := os.environ.get("SLURM_JOB_END_TIME", ""):
        # A job that is past its end is being ended by signals; a variable of another job would stop each start after one step.
        return float(end) if end.isdecimal() and float(end) > time.time() else None
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        return datetime.fromisoformat(commands.output_of(command, 20) or "").timestamp()
    except ValueError:
        return None


def limit(max_time: str | None) -> float | None:
    """When the run has to be over, in seconds since 1970: the sooner of `max_time` after this process began and the end of its
    SLURM job. Raises InputError for a malformed time."""
    try:
        own = None if max_time is None else psutil.Process().create_time() + duration(max_time)
    except ValueError as error:
        raise InputError(f"--max-time: {error}") from None
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")) and end_of_job() is None:
        why = "is over, left by another job" if end.isdigit() else "is no time in seconds"
        print(f"warning: SLURM_JOB_END_TIME={end} {why}: it is ignored; unset it", file=sys.stderr)
    return min((end for end in (own, end_of_job()) if end is not None), default=None)
