"""The log of a run: metrics.jsonl, a tracker beside it, and one progress line a phase."""

import contextlib
import errno
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
from dnal_dist.common.text import printable
from dnal_dist.distributed.context import Context
from dnal_dist.tracking import mlflow, tensorboard, wandb
from dnal_dist.tracking.background import Sender
from dnal_dist.tracking.progress import ProgressLine
from dnal_dist.tracking.values import NAMES

# Seconds that a stopping run waits for its tracker to take the last records. Abandoning a tracker that hangs takes some more.
CLOSE_SECONDS = 10.0


class RunLog:
    """Records, warnings and progress of a run. Only the main process writes; on the others every call does nothing."""

    def __init__(self, folder: Path, recipe, context: Context, keep: int | None = None, tracker_run: str | None = None):
        """keep: on a resume, the number of records at the checkpoint; later ones are removed. None: all stay. tracker_run: the
        tracker's id of the resumed run."""
        self.main, self.global_step = context.main, 0
        self.records, self.ended = 0, False
        """Records in metrics.jsonl, and whether the last one is the run's end."""
        self.tracker_run = tracker_run or secrets.token_hex(4)
        self._sender, self._line, self._begun = None, None, None
        self._unwritten, self._warned, self._lock = b"", False, threading.Lock()
        self._open = threading.Lock()
        self._explained: set[str] = set()
        if not self.main:
            return
        self.console = Console()
        try:
            kept = keep_records(folder / "metrics.jsonl", keep)
            self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        except OSError as error:
            raise InputError(
                f"{folder / 'metrics.jsonl'}: cannot be written ({error.strerror}); correct that", local=True
            ) from None
        self.records, self.ended = len(kept), any('"kind": "end"' in line for line in kept)
        if keep is not None and len(kept) < keep:
            self.warn(f"{folder / 'metrics.jsonl'} holds {len(kept)} of the {keep} records at the checkpoint")
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
                    self.print(f"warning: {remark}")
                if mode == "disabled":
                    return
                tracker = wandb.Wandb(folder, recipe, context, self.tracker_run, mode)
            elif recipe.tracking.tracker == "mlflow":
                tracker = mlflow.MLflow(folder, recipe, context, self.tracker_run)
            else:
                tracker = tensorboard.TensorBoard(folder, recipe, context)
            self._sender = Sender(tracker, behind)
        except Exception as error:
            package = recipe.tracking.tracker
            remedy = f"; pip install {package}, or set tracking.tracker=none" if isinstance(error, ImportError) else ""
            self.warn(f"{self._tracker_name} did not start; the run goes on without it ({error}){remedy}")

    @spanned("logging")
    def record(self, kind: str, **values) -> None:
        """Append a record to metrics.jsonl and send its numbers to the tracker. None, NaN and infinities are left out."""
        if not self.main:
            return
        # JSON has no form of NaN and infinities.
        unknown = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
        values = {key: value for key, value in values.items() if value is not None and key not in unknown}
        head = {"kind": kind, "time": round(time.time(), 3), "global_step": self.global_step}
        self._begun = self._begun or head["time"]
        with self._lock:
            self._unwritten += (json.dumps(head | values) + "\n").encode()
        self.records += 1
        self.ended = self.ended or kind == "end"
        try:
            self.flush()
            self._warned = False
        except OSError as error:
            # Kept until there is room again; no checkpoint is written before (see to_disk).
            if not self._warned:
                self._warned = True
                self.print(f"warning: {self._file.name}: cannot be written ({error.strerror}); training goes on, make room")
        if self._sender is not None:
            self._sender.send(kind, values, self.global_step, int(1000 * (head["time"] - self._begun)))
            while self._sender.faults:
                self.warn(f"{self._tracker_name} {self._sender.faults.pop(0)}")

    def flush(self) -> None:
        """Write what waits to be written. Raises OSError."""
        with self._lock:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def to_disk(self) -> None:
        """Wait until all records so far are on disk. From any thread; raises OSError."""
        if not self.main:
            return
        # The thread that writes a checkpoint may be here while the log is being closed.
        with self._open:
            if self._file.closed:
                if self._unwritten:
                    raise OSError(errno.EIO, "closed before all records could be written", self._file.name)
                return
            self.flush()
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name)):
                raise FileNotFoundError(errno.ENOENT, "replaced while the run writes to it", self._file.name)

    def warn(self, message: str) -> None:
        """Print a warning, and record it unless the run has ended."""
        if self.main:
            self.print(f"warning: {message}")
            # The record of the end stays the last one.
            if not self.ended:
                self.record("warning", message=message)

    def print(self, text: str) -> None:
        if self.main:
            lines = "\n".join(map(printable, text.split("\n")))
            self.console.print(lines, markup=False, highlight=False, soft_wrap=True)

    def begin(self, phase: str, steps: int, done: int) -> None:
        """Start the progress line of a phase after `done` of its `steps`."""
        if self.main:
            self._line = ProgressLine(self.console, phase, steps, done)

    def progress(self, step: int, text: str) -> None:
        if self._line:
            self._line.update(text, step)

    def doing(self, what: str, number: int, total: int) -> None:
        """Show on the progress line how much of something else than a step is done, such as an evaluation."""
        if self._line and total:
            self._line.update(f"{what} {number / total:.0%}")

    def explain(self, text: str) -> None:
        """Print, once, what a number means that looks alarming and is not."""
        if text not in self._explained:
            self._explained.add(text)
            self.print(f"note: {text}")

    def finish(self, text: str) -> None:
        """End the progress line with the phase's result."""
        if self._line:
            self._line.finish(text)
            self._line = None

    def abandon(self) -> None:
        """Leave the progress line as it stands."""
        if self._line:
            self._line.stop()
            self._line = None

    def close(self, patience: float = CLOSE_SECONDS, finished: bool = False) -> None:
        """patience: seconds for the tracker to take the last records, and the run's outcome if it is finished."""
        if not self.main:
            return
        self.abandon()
        # A failure was logged when it happened first.
        with contextlib.suppress(OSError):
            self.to_disk()
        with self._open:
            self._file.close()
        if self._sender is not None:
            sender, self._sender = self._sender, None
            sender.close(patience, self.global_step if finished else None)
            for fault in sender.faults:
                self.print(f"warning: {self._tracker_name} {fault}")


def keep_records(path: Path, count: int | None) -> list[str]:
    """Cut metrics.jsonl at `path` down to its first `count` records (None: all) and return them, one a line. Records after the
    checkpoint go, since the resumed run writes them again; so does an incomplete line."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines[:count]:
        with contextlib.suppress(ValueError):
            json.loads(line)
            kept.append(line)
    if len(kept) < len(lines):
        atomic.replace(path, "".join(kept).encode())
    return kept
