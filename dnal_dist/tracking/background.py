"""A thread sends a run's records to its tracker, beside training."""

import contextlib
import queue
import threading
import time

from dnal_dist.common.errors import reason

# Records that may wait for a tracker; beyond these, records are left out there.
WAITING = 1000
# Seconds that a run waits for its tracker to start.
START_SECONDS = 20.0


# What a tracker's library raises for a value or a name that it does not take; anything else is the tracker's own end.
REFUSALS = (ValueError, TypeError, LookupError)


class Sender:
    """Sends records to a tracker from a thread, so that training never waits. A tracker that fails gets no more records; one that
    refuses an item gets all others."""

    def __init__(self, tracker, behind: int):
        """tracker: a Wandb or a TensorBoard. behind: global step of the last record before a resume. Returns when the tracker has
        started or failed, after START_SECONDS at the latest."""
        self.tracker, self.dropped, self.refused, self.faults, self._failed = tracker, 0, 0, [], False
        """faults: those that were not logged yet."""
        self._queue, self._started = queue.Queue(WAITING), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(behind,), name="tracker", daemon=True)
        self._thread.start()
        self._started.wait(START_SECONDS)

    def send(self, kind: str, values: dict, global_step: int, age: int) -> None:
        """age: milliseconds since the run began."""
        if self._failed:
            return
        try:
            self._queue.put_nowait((self.tracker.send, (kind, values, global_step, age)))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self.faults.append("takes records more slowly than they come; some are left out there")

    def close(self, patience: float, finished: int | None = None) -> None:
        """Wait up to `patience` seconds until everything is sent. finished: last global step of a run whose outcome is sent too."""
        until = time.monotonic() + patience
        with contextlib.suppress(queue.Full):
            if finished is not None and not self._failed:
                self._queue.put((self.tracker.finish, (finished,)), timeout=patience)
            self._queue.put(None, timeout=max(until - time.monotonic(), 0.01))
        self._thread.join(max(until - time.monotonic(), 0.01))
        if self._thread.is_alive():
            self._failed = True
            self.faults.append(f"did not take the last records in {patience:g} s")
            self.tracker.give_up()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._queue.get_nowait()
            self._queue.put(None)
            self._thread.join(1.0)
        if self.dropped:
            self.faults.append(f"was too slow for {self.dropped} records; metrics.jsonl has all")
        if self.refused > 1:
            self.faults.append(f"refused {self.refused} items in all; the run folder has them")

    def _work(self, behind: int) -> None:
        self._try("did not start; the run goes on without it", self.tracker.start, behind)
        self._started.set()
        while (item := self._queue.get()) is not None:
            function, arguments = item
            if not self._failed:
                self._try("stopped taking records; the run goes on without it", self._offer, function, *arguments)
        self._try("did not take the last records", self.tracker.stop)

    def _offer(self, function, *arguments) -> None:
        """function: may return further ones, which are offered one by one."""
        try:
            for item in function(*arguments) or ():
                self._offer(item)
        except REFUSALS as error:
            self.refused += 1
            if self.refused == 1:
                self.faults.append(f"refused an item, and is sent the others ({reason(error)})")

    def _try(self, fault: str, function, *arguments) -> None:
        try:
            if remark := function(*arguments):
                self.faults.append(remark)
        except Exception as error:
            # An error after giving up has that as its cause.
            if not self._failed:
                self.faults.append(f"{fault} ({reason(error)})")
            self._failed = True
