"""Checkpoints are written by a thread of the main process, while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from dnal_dist import recipe
from dnal_dist.checkpoint import format as checkpoint
from dnal_dist.checkpoint.format import Checkpoint
from dnal_dist.common import atomic
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.common.span import spanned

# How often a run that ends tries to write its last checkpoint, and seconds between the tries.
TRIES, BETWEEN = 3, 1.0


class Writer:
    """Writes one checkpoint at a time to `folder`. After a failure it warns, training goes on, and the next save tries again.

    Saving raises InputError when the last checkpoint that could be written is older than the recipe's limit.
    """

    def __init__(self, folder: Path, settings: recipe.Checkpoints, warn: Callable[[str], None], flush: Callable[[], None]):
        """flush: puts the run's records on disk; a checkpoint refers to those written before it. Called from the thread."""
        self.folder, self.settings, self.warn, self.flush = folder, settings, warn, flush
        self.pauses: list[float] = []
        """Seconds that training paused for each checkpoint."""
        self.writes: list[float] = []
        """Seconds that the thread took for each."""
        self.size = 0
        """Bytes of the last one."""
        self.safe = time.monotonic()
        """Time of the last good one; at first, the start of the run."""
        self.saved: int | None = None
        """Its global step, if this process wrote one."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._taken: Checkpoint | None = None
        self._since = time.monotonic()

    @property
    def seconds_for_one(self) -> float:
        """Seconds of the longest save so far, pause and writing."""
        return max(self.pauses, default=0.0) + max(self.writes, default=0.0)

    @property
    def last(self) -> dict[str, float]:
        """`write_seconds` and `bytes` of the last save, if there was one."""
        return {"write_seconds": round(self.writes[-1], 4), "bytes": self.size} if self.writes else {}

    @property
    def age(self) -> float:
        """Seconds since the last save was requested."""
        return time.monotonic() - self._since

    def save(self, taken: Checkpoint) -> None:
        """Write `taken` in the background, after the one that is being written."""
        self.settle()
        self._taken, self._since = taken, time.monotonic()
        self._writing = self._thread.submit(self._write, taken)

    def settle(self) -> bool:
        """Wait for the checkpoint that is being written. Returns False if that failed."""
        if self._writing is None:
            return True
        writing, self._writing = self._writing, None
        try:
            seconds, self.size = writing.result()
        except (OSError, ValueError, MemoryError, SafetensorError) as error:
            self._warn(error)
            return False
        for remark in atomic.weaker if not self.writes else ():
            self.warn(f"{self.folder}: {remark}")
        self.writes.append(seconds)
        self.safe, self.saved = self._since, self._taken.state.global_step
        return True

    def poll(self) -> None:
        """Settle the checkpoint that was being written, if its thread is done."""
        if self._writing is not None and self._writing.done():
            self.settle()

    def finish(self) -> bool:
        """Wait for the last checkpoint, and retry a few times if it cannot be written. Returns whether it was written; raises
        nothing, since the run ends anyway."""
        for number in range(TRIES):
            if number:
                time.sleep(BETWEEN)
                self._writing = self._thread.submit(self._write, self._taken)
            try:
                if self.settle():
                    return True
            except InputError as error:
                self.warn(str(error))
        return False

    def summary(self) -> str:
        number, pauses = len(self.writes), self.pauses
        return (
            f"{number} checkpoint{'s' if number > 1 else ''}, the last of {self.size / 1e6:.3g} MB: training paused "
            f"{sum(pauses):.2f} s in all, {max(pauses):.3f} s at most; written beside it in {max(self.writes):.3f} s at most"
        )

    def close(self) -> None:
        self._thread.shutdown()

    @spanned("checkpoint write")
    def _write(self, taken: Checkpoint) -> tuple[float, int]:
        begun = time.monotonic()
        self.flush()
        size = checkpoint.write(self.folder, taken, self.settings.keep)
        return time.monotonic() - begun, size

    def _warn(self, error: Exception) -> None:
        if not self.folder.parent.exists() and self.folder.parent.parent.exists():
            raise InputError(
                f"key 'output': {self.folder.parent} was removed while the run trained in it, with all that it had saved; the same "
                "command starts again",
                local=True,
            )
        why, todo = reason(error), remedy(error)
        minutes, limit = (time.monotonic() - self.safe) / 60, self.settings.give_up_hours
        failure = f"{self.folder}: checkpoint cannot be written ({why})"
        if minutes > 60 * limit:
            raise InputError(
                f"{failure}, and the last good one is {minutes:.0f} minutes old, more than checkpoint.give_up_hours={limit:g} "
                f"allows; {todo}, then use the same command again",
                local=True,
            )
        last = (
            "there is none yet" if self.saved is None else f"the last good one is of step {self.saved}, {minutes:.0f} minutes old"
        )
        self.warn(f"{failure}; {last}. Training goes on and the next save tries again: {todo}")
