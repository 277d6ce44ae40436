"""What a run tells while it goes on: metrics.jsonl always, a tracker beside it, one progress line a phase."""

import contextlib
import json
import math
import os
import secrets
import threading
import time
from pathlib import Path

from rich.console import Console

from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError
from dnal_dist.common.span import spanned
from dnal_dist.distributed.context import Context
from dnal_dist.tracking import tensorboard, wandb
from dnal_dist.tracking.background import Sender
from dnal_dist.tracking.progress import _Bar, _PlainLine
from dnal_dist.tracking.values import NAMES

# How long a run that stops waits for its tracker to take the last records; it takes some seconds more to let go of one that hangs.
CLOSE_SECONDS = 10.0


class RunLog:
    """The record of a run. Only the main process has one; on the others every call does nothing."""

    def __init__(self, folder: Path, recipe, context: Context, keep: int | None = None, tracker_run: str | None = None):
        """keep: on resume, how many records stay, those of the time of the checkpoint; None: all that there are. tracker_run: the
        name under which the tracker knows the run that goes on."""
        self.main, self.global_step = context.main, 0
        self.records, self.ended = 0, False
        """Records in metrics.jsonl, and whether the last one is the run's end."""
        self.tracker_run = tracker_run or secrets.token_hex(4)
        self._sender, self._line, self._begun = None, None, None
        self._unwritten, self._warned, self._lock = b"", False, threading.Lock()
        if not self.main:
            return
        self.console = Console()
        try:
            kept = keep_records(folder / "metrics.jsonl", keep)
            self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{folder / 'metrics.jsonl'}: cannot be written ({error.strerror}); mend that", local=True) from None
        self.records, self.ended = len(kept), any('"kind": "end"' in line for line in kept)
        if keep is not None and len(kept) < keep:
            self.warn(f"{folder / 'metrics.jsonl'} holds {len(kept)} of the {keep} records that were told by the checkpoint")
        behind = 0
        with contextlib.suppress(LookupError, TypeError):
            self._begun, behind = json.loads(kept[0])["time"], json.loads(kept[-1])["global_step"]
        if recipe.tracking.tracker != "none" and not self.ended:
            self._tracker_name = NAMES[recipe.tracking.tracker]
            self._start_tracker(context, folder, recipe, behind)

    def _start_tracker(self, context: Context, folder: Path, recipe, behind: int) -> None:
        try:
            if recipe.tracking.tracker == "wandb":
                mode, remark = wandb.wandb_mode(recipe.tracking.mode)
                if remark:
                    self.say(f"warning: {remark}")
                tracker = wandb.Wandb(folder, recipe, context, self.tracker_run, mode)
            else:
                tracker = tensorboard.TensorBoard(folder, recipe, context)
            self._sender = Sender(tracker, behind)
        except Exception as error:
            self.warn(f"{self._tracker_name} did not start; the run goes on without it ({error})")

    @spanned("logging")
    def record(self, kind: str, **values) -> None:
        """Append a record to metrics.jsonl and send its numbers to the tracker. What is None or no finite number is left out."""
        if not self.main:
            return
        values = {key: value for key, value in values.items() if value is not None and not _is_no_number(value)}
        head = {"kind": kind, "time": round(time.time(), 3), "global_step": self.global_step}
        self._begun = self._begun or head["time"]
        with self._lock:
            self._unwritten += (json.dumps(head | values) + "\n").encode()
        self.records += 1
        self.ended = self.ended or kind == "end"
        try:
            self._flush()
            self._warned = False
        except OSError as error:
            # It keeps until there is room again; a checkpoint is not written before (see to_disk).
            if not self._warned:
                self._warned = True
                self.say(f"warning: {self._file.name}: cannot be written ({error.strerror}); training goes on, make room")
        if self._sender is not None:
            self._sender.take(kind, values, self.global_step, int(1000 * (head["time"] - self._begun)))
            while self._sender.faults:
                self.warn(f"{self._tracker_name} {self._sender.faults.pop(0)}")

    def _flush(self) -> None:
        with self._lock:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def to_disk(self) -> None:
        """Wait until all records so far are on disk. From any thread; raises OSError."""
        if self.main and not self._file.closed:
            self._flush()
            os.fsync(self._file.fileno())

    def warn(self, message: str) -> None:
        """Something that deserves a look: on the console, and in the record."""
        if self.main:
            self.say(f"warning: {message}")
            # That a run has ended stays its last word.
            if not self.ended:
                self.record("warning", message=message)

    def say(self, text: str) -> None:
        if self.main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, phase: str, steps: int, done: int) -> None:
        """Start the progress line of a phase of `steps` iterations, `done` of which lie behind."""
        if self.main:
            kind = _Bar if self.console.is_terminal else _PlainLine
            self._line = kind(self.console, phase, steps, done)

    def progress(self, step: int, text: str) -> None:
        if self._line:
            self._line.update(step, text)

    def finish(self, text: str) -> None:
        """End the phase's line with its result."""
        if self._line:
            self._line.finish(text)
            self._line = None

    def abandon(self) -> None:
        """Leave the phase's line as it stands."""
        if self._line:
            self._line.abandon()
            self._line = None

    def close(self, patience: float = CLOSE_SECONDS, finished: bool = False) -> None:
        """patience: seconds that the tracker has to take the rest, with the run's outcome if it has finished."""
        if not self.main:
            return
        self.abandon()
        # What cannot be written now was told when it failed first.
        with contextlib.suppress(OSError):
            self.to_disk()
        self._file.close()
        if self._sender is not None:
            sender, self._sender = self._sender, None
            sender.close(patience, self.global_step if finished else None)
            for fault in sender.faults:
                self.say(f"warning: {self._tracker_name} {fault}")


def _is_no_number(value) -> bool:
    """NaN and the infinities, which JSON does not have."""
    return isinstance(value, float) and not math.isfinite(value)


def keep_records(path: Path, count: int | None) -> list[str]:
    """Cut metrics.jsonl at `path` down to its first `count` records (None: all) and return them, one a line. What a lost part of a
    run wrote after its checkpoint goes, since the resumed run tells it again; a line that was cut off goes too."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines[:count]:
        with contextlib.suppress(ValueError):
            json.loads(line)
            kept.append(line)
    if len(kept) < len(lines):
        atomic.replace(path, "".join(kept).encode())
    return kept
