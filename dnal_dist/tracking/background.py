"""The thread that gives a run's records to its tracker, beside training."""

import contextlib
import queue
import threading
import time

# Records that may wait for a tracker; what comes while so many do is left out there.
WAITING = 1000
# How long a run waits for its tracker to start.
START_SECONDS = 20.0


def said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class Sender:
    """Gives records to a tracker from a thread, so that training waits for none. One that fails is left alone from then on."""

    def __init__(self, tracker, behind: int):
        """tracker: a trackers.Wandb or trackers.TensorBoard. behind: the global step that lies behind. Returns when the tracker
        has started or failed to, but after START_SECONDS at the latest."""
        self.tracker, self.dropped, self.faults, self._failed = tracker, 0, [], False
        """faults: what went wrong and was not said yet."""
        self._queue, self._started = queue.Queue(WAITING), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(behind,), name="tracker", daemon=True)
        self._thread.start()
        self._started.wait(START_SECONDS)

    def take(self, kind: str, values: dict, global_step: int, age: int) -> None:
        """age: milliseconds since the run began."""
        if self._failed:
            return
        try:
            self._queue.put_nowait((self.tracker.take, (kind, values, global_step, age)))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self.faults.append("takes records more slowly than they come; some are left out there")

    def close(self, patience: float, finished: int | None = None) -> None:
        """Wait up to `patience` seconds until all is given, with the run's outcome if it has finished, at that global step."""
        until = time.monotonic() + patience
        with contextlib.suppress(queue.Full):
            if finished is not None and not self._failed:
                self._queue.put((self.tracker.deliver, (finished,)), timeout=patience)
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
            self.faults.append(f"was not given {self.dropped} records, since it took others too slowly; metrics.jsonl has all")

    def _work(self, behind: int) -> None:
        try:
            if remark := self.tracker.start(behind):
                self.faults.append(remark)
        except Exception as error:
            self._fail("did not start", error)
        self._started.set()
        while (item := self._queue.get()) is not None:
            if self._failed:
                continue
            do, what = item
            try:
                do(*what)
            except Exception as error:
                self._fail("stopped taking records", error)
        try:
            self.tracker.stop()
        except Exception as error:
            self._fail("did not take the last records", error)

    def _fail(self, what: str, error: Exception) -> None:
        # After it was given up the error is of our own making.
        if not self._failed:
            self.faults.append(f"{what}; the run goes on without it ({said(error)})")
        self._failed = True
